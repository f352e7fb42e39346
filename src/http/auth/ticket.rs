//! Tickets: what a page shows once to open a WebSocket, instead of a token that would stay in logs and histories.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use super::keys::random_text;
use super::principal::Principal;

/// How long a ticket can be used.
pub(in crate::http) const LIFETIME: Duration = Duration::from_secs(30);
/// The most tickets that wait to be used, in all and of one principal.
const MOST: usize = 10_000;
const MOST_PER_PRINCIPAL: usize = 100;

/// The tickets that were given and not used yet, by their hashes.
#[derive(Default)]
pub(super) struct Tickets(Mutex<HashMap<[u8; 32], Ticket>>);

struct Ticket {
    principal: Principal,
    /// The page that may use it; nothing for programs.
    origin: Option<String>,
    ends: Instant,
}

impl Tickets {
    /// A ticket for the principal on a page of that origin; nothing where too many wait to be used.
    pub(super) fn give(&self, principal: &Principal, origin: Option<String>, now: Instant) -> Option<String> {
        let mut tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tickets.retain(|_, ticket| ticket.ends > now);
        let of_principal = tickets.values().filter(|ticket| ticket.principal.is_same(principal)).count();
        if tickets.len() >= MOST || of_principal >= MOST_PER_PRINCIPAL {
            return None;
        }
        let text = random_text();
        tickets.insert(hash(&text), Ticket { principal: principal.clone(), origin, ends: now + LIFETIME });
        Some(text)
    }

    /// Whose ticket it is. It can't be used again, even where it does not fit.
    pub(super) fn take(&self, text: &str, origin: Option<&str>, now: Instant) -> Option<Principal> {
        let ticket = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&hash(text))?;
        let fits = ticket.ends > now && ticket.origin.as_deref() == origin;
        fits.then_some(ticket.principal)
    }
}

fn hash(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::Filter;

    fn principal(name: &str) -> Principal {
        Principal::new(name.to_owned(), Vec::new(), None, Filter::default(), None)
    }

    #[test]
    fn a_ticket_is_used_once_in_time_and_by_its_page() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        let page = || Some("https://soc.example".to_owned());
        let give = || tickets.give(&principal("ops"), page(), now).expect("a ticket");
        let ticket = give();
        assert_eq!(tickets.take(&ticket, page().as_deref(), now), Some(principal("ops")));
        assert_eq!(tickets.take(&ticket, page().as_deref(), now), None, "used");
        assert_eq!(tickets.take(&give(), Some("https://evil.example"), now), None);
        assert_eq!(tickets.take(&give(), None, now), None);
        assert_eq!(tickets.take(&give(), page().as_deref(), now + LIFETIME), None, "too late");
        let stolen = give();
        assert_eq!(tickets.take(&stolen, Some("https://evil.example"), now), None);
        assert_eq!(tickets.take(&stolen, page().as_deref(), now), None, "gone once it was shown");
        assert_eq!(tickets.take("guess", None, now), None);
    }

    #[test]
    fn tickets_that_wait_are_bounded_and_make_room_when_they_end() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        for _ in 0..MOST_PER_PRINCIPAL {
            tickets.give(&principal("ops"), None, now).expect("a ticket");
        }
        assert_eq!(tickets.give(&principal("ops"), None, now), None);
        assert!(tickets.give(&principal("soc"), None, now).is_some());
        assert!(tickets.give(&principal("ops"), None, now + LIFETIME).is_some());
    }
}
