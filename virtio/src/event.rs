//! Event suppression by index, which both sides of a ring decide the same way (virtio 1.3, section 2.7.7.2,
//! `vring_need_event`).

/// Whether an event at `event` lies among the indices passed on the way from `old` to `new`.
#[inline(always)]
pub(crate) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
