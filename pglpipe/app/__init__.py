"""From a command line or a file to a finished run."""
