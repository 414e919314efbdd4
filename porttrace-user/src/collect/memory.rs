//! How the allocator behaves in a process that stays for days.

/// Has memory that was needed for a moment given back: the dump of a large node's rules is read, understood and dropped. glibc would
/// keep such pieces, raise the size from which it returns them (mallopt(3), `M_MMAP_THRESHOLD`), and open up to eight arenas for
/// each CPU, as each thread that reads something finds the others' in use.
pub fn give_back_early() {
    #[cfg(target_env = "gnu")]
    {
        const LARGE: i32 = 512 * 1024;
        for (parameter, value) in
            [(libc::M_MMAP_THRESHOLD, LARGE), (libc::M_TRIM_THRESHOLD, LARGE), (libc::M_ARENA_MAX, 2)]
        {
            // SAFETY: mallopt takes two integers, and changes nothing about memory that is in use. Where it refuses, memory stays as it
            // would have been.
            unsafe { libc::mallopt(parameter, value) };
        }
    }
}
