"""What tests share.

::

    factories         how stages learn, one stage, a worker: each with a test's defaults
    worlds            every rank a thread of this process; small networks, batches, whole runs on such ranks
    edges             ends of edges that are seen through
    streams           lanes that need no GPU
    screen            what a terminal would show
    commands          the command line, inside this process or in processes of its own, to find and to kill
    launch            a launcher of our own, which forks the workers
    kinds             every kind of guidance and every method, as options of a trainer
    reference_guided  guided training by its published words, in one loop
    ambush            a network that strikes itself
    waiting           forbids a host to wait for its GPU
"""
