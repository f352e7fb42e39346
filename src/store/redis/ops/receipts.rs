//! Settles deliveries by their receipts, with one script.

use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::script;
use crate::store::redis::ops::keys;
use crate::store::redis::{RedisStore, key};
use crate::store::{Cursor, Receipt, ReceiptAction};

impl RedisStore {
    /// Acknowledges or holds the deliveries with valid receipts. Returns for each whether its receipt was valid.
    pub(crate) async fn redeem_all(
        &self,
        cursor: &Cursor,
        actions: &[(Receipt, ReceiptAction)],
    ) -> Result<Vec<bool>, Failure> {
        let mut good = Vec::with_capacity(actions.len());
        for chunk in actions.chunks(script::MAX_IDS) {
            let mut arguments = Arguments::with_capacity(2 + chunk.len() * 5);
            arguments.name(cursor.group.as_str()).display(&cursor.claim_idle.as_millis());
            for (receipt, redemption) in chunk {
                arguments.display(&receipt.id).name(receipt.consumer.as_str()).display(&receipt.attempt);
                match redemption {
                    ReceiptAction::Acknowledge => arguments.text("").text("0"),
                    ReceiptAction::Hold { by, lease } => arguments.name(by.as_str()).display(&lease.as_millis()),
                };
            }
            let keys = vec![key(&cursor.stream), keys::account(&cursor.stream)];
            let answers = self.run_as(&script::SETTLE_BY_RECEIPT, cursor, keys, arguments).await?.list()?;
            if answers.len() != chunk.len() {
                return Err(Failure::unexpected("the number of results differs from the number of receipts"));
            }
            for answer in answers {
                good.push(answer.count()? == 1);
            }
        }
        Ok(good)
    }
}
