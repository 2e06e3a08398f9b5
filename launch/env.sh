# Shared by the launchers, to be sourced. A variable that is already set keeps its value.

# Threads per worker. More workers than cores / threads slow each other down, and the order in which
# threads add numbers changes the last bits: equal runs need an equal count.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# glibc hands the blocks of a step back to the kernel and pays a page fault for every page of the next
# step. 1 GiB (in bytes) lets it keep them: malloc maps blocks of its own from this size on, ...
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}"
# ... and trims the heap only when as much is free at its end.
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1073741824}"
