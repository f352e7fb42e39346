//! Tickets: what a page shows once to open a WebSocket, instead of a token that would stay in logs and histories.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use crate::auth::PageOrigin;
use crate::auth::keys::random_text;
use crate::auth::principal::Principal;

/// How long a ticket can be used.
pub(crate) const LIFETIME: Duration = Duration::from_secs(30);
/// The most tickets that wait to be used, in all and of one principal.
const MOST: usize = 10_000;
const MOST_PER_PRINCIPAL: usize = 100;

/// The tickets that were given and not used yet, by their hashes.
#[derive(Default)]
pub(crate) struct Tickets(Mutex<HashMap<[u8; 32], Ticket>>);

struct Ticket {
    principal: Principal,
    /// Who may use it.
    page: PageOrigin,
    ends: Instant,
}

impl Tickets {
    /// A ticket for the principal on that page; nothing where too many wait to be used.
    pub(crate) fn give(&self, principal: &Principal, page: PageOrigin, now: Instant) -> Option<String> {
        let mut tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tickets.retain(|_, ticket| ticket.ends > now);
        let of_principal = tickets.values().filter(|ticket| ticket.principal.is_same(principal)).count();
        if tickets.len() >= MOST || of_principal >= MOST_PER_PRINCIPAL {
            return None;
        }
        let text = random_text();
        tickets.insert(hash(&text), Ticket { principal: principal.clone(), page, ends: now + LIFETIME });
        Some(text)
    }

    /// Whose ticket it is. It can't be used again, even where it does not fit.
    pub(crate) fn take(&self, text: &str, page: &PageOrigin, now: Instant) -> Option<Principal> {
        let ticket = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&hash(text))?;
        let fits = ticket.ends > now && ticket.page.is(page);
        fits.then_some(ticket.principal)
    }
}

fn hash(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Filter;

    const PROGRAM: PageOrigin = PageOrigin { origin: None, may_be_own: true };

    fn principal(name: &str) -> Principal {
        Principal::new(name.to_owned(), Vec::new(), None, Filter::default(), None)
    }

    #[test]
    fn a_ticket_is_used_once_in_time_and_by_its_page() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        let of = |origin: &str| PageOrigin { origin: Some(origin.to_owned()), may_be_own: false };
        let (page, evil, program) = (of("https://soc.example"), of("https://evil.example"), PROGRAM);
        let give = || tickets.give(&principal("ops"), page.clone(), now).expect("a ticket");
        let ticket = give();
        assert_eq!(tickets.take(&ticket, &page, now), Some(principal("ops")));
        assert_eq!(tickets.take(&ticket, &page, now), None, "used");
        assert_eq!(tickets.take(&give(), &evil, now), None);
        assert_eq!(tickets.take(&give(), &program, now), None);
        assert_eq!(tickets.take(&give(), &page, now + LIFETIME), None, "too late");
        let stolen = give();
        assert_eq!(tickets.take(&stolen, &evil, now), None);
        assert_eq!(tickets.take(&stolen, &page, now), None, "gone once it was shown");
        assert_eq!(tickets.take("guess", &program, now), None);
    }

    #[test]
    fn tickets_that_wait_are_bounded_and_make_room_when_they_end() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        for _ in 0..MOST_PER_PRINCIPAL {
            tickets.give(&principal("ops"), PROGRAM, now).expect("a ticket");
        }
        assert_eq!(tickets.give(&principal("ops"), PROGRAM, now), None);
        assert!(tickets.give(&principal("soc"), PROGRAM, now).is_some());
        assert!(tickets.give(&principal("ops"), PROGRAM, now + LIFETIME).is_some());
    }
}
