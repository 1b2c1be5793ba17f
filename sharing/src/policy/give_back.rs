//! Where freeing the memory of free pages stands, for one VM.

/// Where giving back stands, for one VM.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Giving {
    pub(crate) work: Work,
    /// Number of the last request.
    pub(crate) request: u32,
    /// Pages that were put on frames for it.
    pub(crate) lent: u32,
    /// Of those, the ones that were freed.
    pub(crate) given: u32,
    /// The next pass is left out, since the last request was futile.
    pub(crate) pause: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Work {
    #[default]
    None,
    /// Free pages are put on frames, from this one on.
    Lending(u32),
    /// The guest is asked.
    Asked,
    /// Pages are freed, from this one on.
    Taking(u32),
}
