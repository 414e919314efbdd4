//! What has to be said to the compiler of the kernel side, and to the machine, in its own words.

/// The value; the compiler does not know that it is the same.
///
/// It would otherwise make branches of arithmetic, each of which doubles what the verifier has to walk; and of zeros side by side a
/// call of `memset`, which for this target is a loop over bytes.
#[inline(always)]
pub fn opaque(value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut value = value;
        // SAFETY: no instruction at all.
        unsafe { core::arch::asm!("/* {0} */", inout(reg) value, options(pure, nomem, nostack, preserves_flags)) };
        value
    }
    #[cfg(not(target_arch = "bpf"))]
    value
}

/// So many words of zeros, word by word.
///
/// # Safety
/// `to` points to so many words that may be written.
#[inline(always)]
pub unsafe fn clear(to: *mut u64, words: usize) {
    let zero = opaque(0);
    for index in 0..words {
        // SAFETY: it is the caller's promise.
        unsafe { to.add(index).write(zero) };
    }
}

/// Takes the word and leaves so much more in its place, atomically. core has no `fetch_add` for this target.
///
/// # Safety
/// `word` points to an aligned word.
#[inline(always)]
pub unsafe fn fetch_add(word: *mut u64, amount: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut amount = amount;
        // SAFETY: it is the caller's promise.
        unsafe {
            core::arch::asm!("{0} = atomic_fetch_add((u64 *)({1} + 0), {0})", inout(reg) amount, in(reg) word);
        }
        amount
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        use core::sync::atomic::{AtomicU64, Ordering};
        // SAFETY: it is the caller's promise.
        unsafe { AtomicU64::from_ptr(word) }.fetch_add(amount, Ordering::AcqRel)
    }
}
