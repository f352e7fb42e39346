//! The web page that a request comes from.

/// The page that sent a request, as its browser reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PageOrigin {
    /// `None` for programs, and for pages of the daemon's own origin when they read.
    pub(crate) origin: Option<String>,
    /// Whether nothing contradicts that the page has the daemon's own origin.
    pub(crate) may_be_own: bool,
}

impl PageOrigin {
    /// Returns whether `presented` may be the page that this one is.
    pub(crate) fn matches(&self, presented: &Self) -> bool {
        let is_own = self.may_be_own && presented.may_be_own && presented.origin.is_none();
        self.origin == presented.origin || is_own
    }
}
