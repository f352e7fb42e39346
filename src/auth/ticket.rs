//! Tickets: texts that open one WebSocket or feed each. A token in a URL would stay in logs and histories.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use crate::auth::PageOrigin;
use crate::auth::keys::random_text;
use crate::auth::principal::Principal;

/// The time for which a ticket is valid.
pub(crate) const LIFETIME: Duration = Duration::from_secs(30);
/// The most unused tickets, in all and per principal.
const MAX_TICKETS: usize = 10_000;
const MAX_PER_PRINCIPAL: usize = 100;

/// The unused tickets, by their hashes.
#[derive(Default)]
pub(crate) struct Tickets(Mutex<HashMap<[u8; 32], Ticket>>);

struct Ticket {
    principal: Principal,
    /// The page that may use it.
    page: PageOrigin,
    expires_at: Instant,
}

impl Tickets {
    /// Issues a ticket for the principal on that page. Returns `None` if too many are unused.
    pub(crate) fn issue(&self, principal: &Principal, page: PageOrigin, now: Instant) -> Option<String> {
        let mut tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tickets.retain(|_, ticket| ticket.expires_at > now);
        let of_principal = tickets.values().filter(|ticket| ticket.principal.is_same(principal)).count();
        if tickets.len() >= MAX_TICKETS || of_principal >= MAX_PER_PRINCIPAL {
            return None;
        }
        let text = random_text();
        tickets.insert(hash(&text), Ticket { principal: principal.clone(), page, expires_at: now + LIFETIME });
        Some(text)
    }

    /// Returns the principal of a ticket. The ticket is used up, also if it has expired or is for another page.
    pub(crate) fn redeem(&self, text: &str, page: &PageOrigin, now: Instant) -> Option<Principal> {
        let ticket = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&hash(text))?;
        let is_valid = ticket.expires_at > now && ticket.page.matches(page);
        is_valid.then_some(ticket.principal)
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
    fn ticket_is_valid_once_in_time_and_for_its_page() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        let of = |origin: &str| PageOrigin { origin: Some(origin.to_owned()), may_be_own: false };
        let (page, evil, program) = (of("https://soc.example"), of("https://evil.example"), PROGRAM);
        let issue = || tickets.issue(&principal("ops"), page.clone(), now).expect("a ticket");
        let ticket = issue();
        assert_eq!(tickets.redeem(&ticket, &page, now), Some(principal("ops")));
        assert_eq!(tickets.redeem(&ticket, &page, now), None, "already used");
        assert_eq!(tickets.redeem(&issue(), &evil, now), None);
        assert_eq!(tickets.redeem(&issue(), &program, now), None);
        assert_eq!(tickets.redeem(&issue(), &page, now + LIFETIME), None, "too late");
        let stolen = issue();
        assert_eq!(tickets.redeem(&stolen, &evil, now), None);
        assert_eq!(tickets.redeem(&stolen, &page, now), None, "used up by the wrong page");
        assert_eq!(tickets.redeem("guess", &program, now), None);
    }

    #[test]
    fn unused_tickets_are_limited_until_they_expire() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        for _ in 0..MAX_PER_PRINCIPAL {
            tickets.issue(&principal("ops"), PROGRAM, now).expect("a ticket");
        }
        assert_eq!(tickets.issue(&principal("ops"), PROGRAM, now), None);
        assert!(tickets.issue(&principal("soc"), PROGRAM, now).is_some());
        assert!(tickets.issue(&principal("ops"), PROGRAM, now + LIFETIME).is_some());
    }
}
