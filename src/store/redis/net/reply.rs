//! Parses replies of the server as bytes.
//!
//! Names and values are arbitrary bytes; bodies are slices of the read buffer. A reply without the format of its command
//! is an error, never a guess: on a confused connection the next reply would belong to another command.

use bytes::Bytes;
use fred::types::Resp3Frame;

use crate::event::{Entry, EntryId, Fields, StreamName};
use crate::store::redis::net::address::Address;
use crate::store::redis::net::error::Failure;

/// A reply or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply(Resp3Frame);

impl Reply {
    /// Accepts a reply of this server, or returns its error.
    pub(crate) fn accept(asked: &Address, frame: Resp3Frame) -> Result<Self, Failure> {
        match frame {
            Resp3Frame::SimpleError { data, .. } => Err(Failure::from_reply_of(asked, &data)),
            Resp3Frame::BlobError { data, .. } => Err(Failure::from_reply_of(asked, &String::from_utf8_lossy(&data))),
            frame => Ok(Self(frame)),
        }
    }

    /// Returns whether it is nil: the reply of a blocking read on timeout, or of a script for `false`.
    pub(crate) fn is_nil(&self) -> bool {
        matches!(self.0, Resp3Frame::Null)
    }

    pub(crate) fn bytes(self) -> Result<Bytes, Failure> {
        match self.0 {
            Resp3Frame::BlobString { data, .. }
            | Resp3Frame::SimpleString { data, .. }
            | Resp3Frame::VerbatimString { data, .. } => Ok(data),
            other => Err(unexpected("a text", &other)),
        }
    }

    pub(crate) fn text(self) -> Result<String, Failure> {
        let bytes = self.bytes()?;
        String::from_utf8(bytes.into()).map_err(|e| Failure::unexpected(&format!("a text that is not UTF-8: {e}")))
    }

    /// A count: an integer that is not negative.
    pub(crate) fn count(self) -> Result<u64, Failure> {
        match self.0 {
            Resp3Frame::Number { data, .. } => {
                u64::try_from(data).map_err(|e| Failure::unexpected(&format!("the count {data}: {e}")))
            }
            other => Err(unexpected("a count", &other)),
        }
    }

    /// A count, or `None` for nil, which means that the server does not know it.
    pub(crate) fn count_if_known(self) -> Result<Option<u64>, Failure> {
        if self.is_nil() { Ok(None) } else { self.count().map(Some) }
    }

    pub(crate) fn list(self) -> Result<Vec<Self>, Failure> {
        self.frames().map(|frames| frames.into_iter().map(Self).collect())
    }

    /// A list of exactly `N`.
    pub(crate) fn tuple<const N: usize>(self) -> Result<[Self; N], Failure> {
        let list = self.list()?;
        let length = list.len();
        let wrong = |_list| Failure::unexpected(&format!("a list of {length} instead of {N}"));
        list.try_into().map_err(wrong)
    }

    pub(crate) fn id(self) -> Result<EntryId, Failure> {
        parse_id(&self.bytes()?)
    }

    pub(crate) fn ids(self) -> Result<Vec<EntryId>, Failure> {
        self.list()?.into_iter().map(Self::id).collect()
    }

    /// The entries of an XRANGE reply: `[[id, [name, value, …]], …]`.
    pub(crate) fn entries(self) -> Result<Vec<Entry>, Failure> {
        self.frames()?.into_iter().map(|frame| Self(frame).entry()).collect()
    }

    /// The entries of an XREAD or XREADGROUP reply for one stream: nil, or `[[stream, entries]]`.
    pub(crate) fn entries_of_one_stream(self) -> Result<Vec<Entry>, Failure> {
        if self.is_nil() {
            return Ok(Vec::new());
        }
        let [stream] = self.tuple()?;
        let [_name, entries] = stream.tuple()?;
        entries.entries()
    }

    /// The last entry id of each stream in an XREAD reply.
    pub(crate) fn ends_of_streams(self) -> Result<Vec<(StreamName, EntryId)>, Failure> {
        if self.is_nil() {
            return Ok(Vec::new());
        }
        let end = |stream: Self| {
            let [name, entries] = stream.tuple()?;
            let name = name.text()?;
            let name = name.parse().map_err(|e| Failure::unexpected(&format!("the stream {name:?}: {e}")))?;
            let last = entries.entries()?.last().map(|entry| entry.id);
            Ok((name, last.ok_or_else(|| Failure::unexpected("a stream without entries"))?))
        };
        self.list()?.into_iter().map(end).collect()
    }

    /// The names and values of an XINFO reply, which alternate.
    pub(crate) fn named(self) -> Result<Named, Failure> {
        if let Resp3Frame::Map { data, .. } = self.0 {
            let pair = |(name, value)| Ok((Self(name).bytes()?, Some(Self(value))));
            return data.into_iter().map(pair).collect::<Result<_, Failure>>().map(Named);
        }
        let mut list = self.list()?.into_iter();
        let mut named = Vec::with_capacity(list.len() / 2);
        while let Some(name) = list.next() {
            let value = list.next().ok_or_else(|| Failure::unexpected("a name without a value"))?;
            named.push((name.bytes()?, Some(value)));
        }
        Ok(Named(named))
    }

    fn entry(self) -> Result<Entry, Failure> {
        let [id, fields] = self.tuple()?;
        let id = id.id()?;
        let flat = fields.frames()?;
        let mut fields = Fields::with_capacity(flat.len() / 2);
        let mut flat = flat.into_iter();
        while let Some(name) = flat.next() {
            let value = flat.next().ok_or_else(|| Failure::unexpected("a field without a value"))?;
            fields.push(Self(name).bytes()?, Self(value).bytes()?);
        }
        Ok(Entry { id, fields })
    }

    fn frames(self) -> Result<Vec<Resp3Frame>, Failure> {
        match self.0 {
            Resp3Frame::Array { data, .. } => Ok(data),
            other => Err(unexpected("a list", &other)),
        }
    }
}

/// The named parts of a reply.
#[derive(Debug)]
pub(crate) struct Named(Vec<(Bytes, Option<Reply>)>);

impl Named {
    /// Removes and returns the part of that name, or `None` if the server does not send it.
    pub(crate) fn find(&mut self, name: &str) -> Option<Reply> {
        self.0.iter_mut().find(|(n, _)| n.as_ref() == name.as_bytes()).and_then(|(_, value)| value.take())
    }

    /// Removes and returns the part of that name.
    pub(crate) fn take(&mut self, name: &str) -> Result<Reply, Failure> {
        self.find(name).ok_or_else(|| Failure::unexpected(&format!("`{name}` is missing")))
    }
}

/// Parses an entry id.
pub(crate) fn parse_id(text: &[u8]) -> Result<EntryId, Failure> {
    let id = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    id.ok_or_else(|| Failure::unexpected(&format!("{:?} instead of an entry id", String::from_utf8_lossy(text))))
}

fn unexpected(wanted: &str, found: &Resp3Frame) -> Failure {
    let found = match found {
        Resp3Frame::BlobString { .. } | Resp3Frame::SimpleString { .. } => "a text",
        Resp3Frame::Number { .. } => "a number",
        Resp3Frame::Array { .. } => "a list",
        Resp3Frame::Null => "nil",
        Resp3Frame::SimpleError { .. } | Resp3Frame::BlobError { .. } => "an error",
        _ => "another type",
    };
    Failure::unexpected(&format!("{found} instead of {wanted}"))
}

/// Parses a reply in every way that commands do. Each must return a value or a failure.
#[cfg(any(test, fuzzing))]
pub fn fuzz(frame: &Resp3Frame) {
    let ways: [fn(Reply) -> bool; 11] = [
        |reply| reply.bytes().is_ok(),
        |reply| reply.text().is_ok(),
        |reply| reply.count().is_ok(),
        |reply| reply.count_if_known().is_ok(),
        |reply| reply.list().is_ok(),
        |reply| reply.tuple::<2>().is_ok(),
        |reply| reply.id().is_ok(),
        |reply| reply.ids().is_ok(),
        |reply| reply.entries().is_ok(),
        |reply| reply.entries_of_one_stream().is_ok(),
        |reply| reply.named().is_ok_and(|mut named| named.take("length").and_then(Reply::count).is_ok()),
    ];
    let asked = Address::new("127.0.0.1", 6379);
    for read in ways {
        match Reply::accept(&asked, frame.clone()) {
            Ok(reply) => std::hint::black_box(read(reply)),
            Err(failure) => std::hint::black_box(failure.breaks_connection),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreErrorKind;

    fn text(bytes: &'static [u8]) -> Resp3Frame {
        Resp3Frame::BlobString { data: Bytes::from_static(bytes), attributes: None }
    }

    fn list(data: Vec<Resp3Frame>) -> Resp3Frame {
        Resp3Frame::Array { data, attributes: None }
    }

    fn number(data: i64) -> Resp3Frame {
        Resp3Frame::Number { data, attributes: None }
    }

    #[test]
    fn entries_keep_order_duplicates_and_odd_bytes() {
        let fields = list(vec![text(b"a"), text(b"1"), text(b"a"), text(b"\xff\xfe"), text(b""), text(b"")]);
        let reply = list(vec![list(vec![text(b"aurora:alerts"), list(vec![list(vec![text(b"5-7"), fields])])])]);
        let entries = Reply(reply).entries_of_one_stream().expect("well formed");
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].id, EntryId::new(5, 7));
        let fields: Vec<_> = entries[0].fields.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect();
        let expected: [(&[u8], &[u8]); 3] = [(b"a", b"1"), (b"a", b"\xff\xfe"), (b"", b"")];
        assert_eq!(fields, expected.map(|(n, v)| (n.to_vec(), v.to_vec())));
    }

    #[test]
    fn whatever_is_answered_is_a_value_or_a_failure() {
        let error = |text: &str| Resp3Frame::SimpleError { data: text.into(), attributes: None };
        let entry = list(vec![text(b"5-7"), list(vec![text(b"a"), text(b"1")])]);
        let all = [Resp3Frame::Null, number(-1), text(b"\xff"), list(vec![]), entry, error("MOVED 5 :6380"), error("")];
        all.iter().for_each(fuzz);
    }

    #[test]
    fn nil_is_no_entries() {
        assert!(Reply(Resp3Frame::Null).entries_of_one_stream().expect("nil").is_empty());
    }

    #[test]
    fn odd_shapes_are_errors_that_break_the_connection() {
        let odd = [
            number(3),
            text(b"OK"),
            list(vec![]),
            list(vec![list(vec![text(b"s")])]),
            list(vec![list(vec![text(b"s"), list(vec![])]), list(vec![text(b"t"), list(vec![])])]),
            list(vec![list(vec![text(b"s"), list(vec![Resp3Frame::Null])])]),
            list(vec![list(vec![text(b"s"), list(vec![list(vec![text(b"1-1"), Resp3Frame::Null])])])]),
            list(vec![list(vec![text(b"s"), list(vec![list(vec![text(b"1-1"), list(vec![text(b"a")])])])])]),
            list(vec![list(vec![text(b"s"), list(vec![list(vec![text(b"x"), list(vec![])])])])]),
            list(vec![list(vec![text(b"s"), list(vec![list(vec![number(1), list(vec![])])])])]),
        ];
        for frame in odd {
            let shown = format!("{frame:?}");
            let failure = Reply(frame).entries_of_one_stream().expect_err(&shown);
            assert_eq!(failure.kind, StoreErrorKind::Internal, "{shown}");
            assert!(failure.breaks_connection, "{shown}");
        }
        assert!(Reply(number(-1)).count().is_err());
        assert!(Reply(list(vec![text(b"a")])).named().is_err());
        assert!(parse_id(b"99999999999999999999-0").is_err());
    }

    #[test]
    fn error_replies_are_failures() {
        let error = |data: &'static str| Resp3Frame::SimpleError { data: data.into(), attributes: None };
        let failure = Reply::accept(&Address::new("h", 1), error("NOGROUP No such key")).expect_err("an error");
        assert_eq!(failure.kind, StoreErrorKind::NoGroup);
        assert!(!failure.breaks_connection);
    }

    #[test]
    fn named_parts_may_be_missing_or_nil() {
        let reply = list(vec![text(b"length"), number(3), text(b"lag"), Resp3Frame::Null]);
        let mut named = Reply(reply).named().expect("pairs");
        assert_eq!(named.take("length").and_then(Reply::count), Ok(3));
        assert_eq!(named.take("lag").and_then(Reply::count_if_known), Ok(None));
        assert!(named.find("entries-added").is_none());
    }
}
