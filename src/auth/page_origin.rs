//! The web page that a request comes from.

/// Which page asks, as far as its browser tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PageOrigin {
    /// Its origin; nothing of programs, and of pages of the daemon's own origin when they read.
    pub(crate) origin: Option<String>,
    /// Whether nothing speaks against its being a page of the daemon's own origin.
    pub(crate) may_be_own: bool,
}

impl PageOrigin {
    /// Whether what was given to this page is good for the one that shows it.
    pub(crate) fn is(&self, shown: &Self) -> bool {
        let is_own = self.may_be_own && shown.may_be_own && shown.origin.is_none();
        self.origin == shown.origin || is_own
    }
}
