//! The rows of groups, accounts, consumers and pending entries.

use std::collections::{BTreeMap, HashMap};

use rusqlite::{Connection, params};

use crate::event::EntryId;
use crate::store::embedded::disk::chunk::{pack_ids, unpack_ids};
use crate::store::embedded::disk::schema::{checksum, corrupt, engine_error};
use crate::store::embedded::memory::groups::{Consumer, DeliveredBatch, Group};
use crate::store::{Account, StoreError};

pub(crate) fn save_group(connection: &Connection, stream: u32, group: &Group) -> rusqlite::Result<()> {
    let numbers = [
        group.number,
        i64::from(stream),
        group.cursor.ms.cast_signed(),
        group.cursor.seq.cast_signed(),
        group.passed.cast_signed(),
        group.read.cast_signed(),
    ];
    connection
        .prepare_cached(
            "INSERT INTO groups VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (number) DO UPDATE SET
             cursor_ms = ?4, cursor_seq = ?5, passed = ?6, read = ?7, crc = ?8",
        )?
        .execute(params![
            numbers[0],
            numbers[1],
            group.name.as_str(),
            numbers[2],
            numbers[3],
            numbers[4],
            numbers[5],
            checksum(&numbers, group.name.as_str().as_bytes())
        ])
        .map(|_rows| ())
}

pub(crate) fn save_account(connection: &Connection, group: &Group) -> rusqlite::Result<()> {
    let Account { base, acknowledged, filtered, dead, lost } = group.counted;
    let [trimmed_pending, trimmed_undelivered, dropped, damaged] = lost;
    let base = base.unwrap_or_default();
    let counters = [base, acknowledged, filtered, dead, trimmed_pending, trimmed_undelivered, dropped, damaged]
        .map(u64::cast_signed);
    let numbers: Vec<i64> = std::iter::once(group.number).chain(counters).collect();
    let crc = checksum(&numbers, &[]);
    connection
        .prepare_cached("INSERT OR REPLACE INTO accounts VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)")?
        .execute(rusqlite::params_from_iter(numbers.into_iter().chain([crc])))
        .map(|_rows| ())
}

/// Loads the accounts of groups. The account of a group from before format 2 begins now, with its unsettled entries.
fn load_accounts(connection: &Connection, groups: &mut BTreeMap<i64, (u32, Group)>) -> Result<(), StoreError> {
    let failed = |error| engine_error("read the accounts", error);
    for (_, group) in groups.values_mut() {
        group.counted.base = Some(group.passed.saturating_sub(group.pending_count() as u64));
    }
    let mut statement = connection.prepare_cached("SELECT * FROM accounts").map_err(failed)?;
    let mut rows = statement.query([]).map_err(failed)?;
    while let Some(row) = rows.next().map_err(failed)? {
        let mut numbers = [0_i64; 9];
        for (place, number) in numbers.iter_mut().enumerate() {
            *number = row.get(place).map_err(failed)?;
        }
        let is_right = row.get::<_, i64>(9).map_err(failed)? == checksum(&numbers, &[]);
        // A damaged row may name any group: only a row of an existing group is loaded or refused.
        let Some((_, group)) = groups.get_mut(&numbers[0]) else { continue };
        if !is_right {
            return Err(corrupt(format!("the account of group `{}` is damaged", group.name)));
        }
        let [_, base, acknowledged, filtered, dead, lost @ ..] = numbers.map(i64::cast_unsigned);
        group.counted = Account { base: Some(base), acknowledged, filtered, dead, lost };
    }
    Ok(())
}

pub(crate) fn save_consumer(connection: &Connection, group: i64, consumer: &Consumer) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO consumers VALUES (?1, ?2, ?3, ?4) ON CONFLICT (number) DO UPDATE SET seen_ms = ?4",
        )?
        .execute(params![consumer.number, group, consumer.name.as_str(), consumer.seen_ms.cast_signed()])
        .map(|_rows| ())
}

pub(crate) fn delete_consumer(connection: &Connection, number: i64) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM consumers WHERE number = ?1")?.execute([number]).map(|_rows| ())
}

pub(crate) fn save_lease(
    connection: &Connection,
    group: i64,
    number: i64,
    lease: &DeliveredBatch,
) -> rusqlite::Result<()> {
    let ids = pack_ids(&lease.ids);
    let numbers = [number, group, lease.consumer, lease.delivered_ms.cast_signed(), i64::from(lease.attempts)];
    connection
        .prepare_cached("INSERT OR REPLACE INTO leases VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?
        .execute(params![numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], ids, checksum(&numbers, &ids)])
        .map(|_rows| ())
}

pub(crate) fn delete_lease(connection: &Connection, number: i64) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM leases WHERE number = ?1")?.execute([number]).map(|_rows| ())
}

/// Loads the groups of all streams, or of one, by the number of their stream.
pub(crate) fn load_groups(
    connection: &Connection,
    stream: Option<u32>,
) -> Result<HashMap<u32, Vec<Group>>, StoreError> {
    let failed = |error| engine_error("read the groups", error);
    let mut groups: BTreeMap<i64, (u32, Group)> = BTreeMap::new();
    let mut statement =
        connection.prepare_cached("SELECT * FROM groups WHERE ?1 IS NULL OR stream = ?1").map_err(failed)?;
    let mut rows = statement.query([stream]).map_err(failed)?;
    while let Some(row) = rows.next().map_err(failed)? {
        let read = || -> rusqlite::Result<_> {
            let numbers: [i64; 6] = [row.get(0)?, row.get(1)?, row.get(3)?, row.get(4)?, row.get(5)?, row.get(6)?];
            Ok((row.get::<_, String>(2)?, numbers, row.get::<_, i64>(7)?))
        };
        let (name, numbers, crc) = read().map_err(failed)?;
        let damaged = || corrupt(format!("the row of group `{}` is damaged", name.escape_debug()));
        if crc != checksum(&numbers, name.as_bytes()) {
            return Err(damaged());
        }
        let stream = u32::try_from(numbers[1]).map_err(|_range| damaged())?;
        let mut group = Group::new(numbers[0], name.parse().map_err(|_name| damaged())?);
        group.cursor = EntryId::new(numbers[2].cast_unsigned(), numbers[3].cast_unsigned());
        group.passed = numbers[4].cast_unsigned();
        group.read = numbers[5].cast_unsigned();
        groups.insert(group.number, (stream, group));
    }
    load_consumers(connection, &mut groups)?;
    load_leases(connection, &mut groups)?;
    load_accounts(connection, &mut groups)?;
    let mut by_stream: HashMap<u32, Vec<Group>> = HashMap::new();
    for (stream, group) in groups.into_values() {
        by_stream.entry(stream).or_default().push(group);
    }
    Ok(by_stream)
}

fn load_consumers(connection: &Connection, groups: &mut BTreeMap<i64, (u32, Group)>) -> Result<(), StoreError> {
    let failed = |error| engine_error("read the consumers", error);
    let mut statement = connection.prepare_cached("SELECT * FROM consumers").map_err(failed)?;
    let mut rows = statement.query([]).map_err(failed)?;
    while let Some(row) = rows.next().map_err(failed)? {
        let read = || -> rusqlite::Result<(i64, i64, String, i64)> {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        };
        let (number, group, name, seen_ms) = read().map_err(failed)?;
        let damaged = |_name| corrupt(format!("the row of consumer `{}` is damaged", name.escape_debug()));
        let consumer = Consumer::new(number, name.parse().map_err(damaged)?, seen_ms.cast_unsigned());
        if let Some((_, group)) = groups.get_mut(&group) {
            group.put_consumer(consumer);
        }
    }
    Ok(())
}

fn load_leases(connection: &Connection, groups: &mut BTreeMap<i64, (u32, Group)>) -> Result<(), StoreError> {
    let failed = |error| engine_error("read the pending entries", error);
    let mut statement = connection.prepare_cached("SELECT * FROM leases").map_err(failed)?;
    let mut rows = statement.query([]).map_err(failed)?;
    while let Some(row) = rows.next().map_err(failed)? {
        let read = || -> rusqlite::Result<_> {
            let numbers: [i64; 5] = [row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?];
            Ok((numbers, row.get::<_, Vec<u8>>(5)?, row.get::<_, i64>(6)?))
        };
        let (numbers, ids, crc) = read().map_err(failed)?;
        let is_right = crc == checksum(&numbers, &ids);
        // A damaged row may name any group: only a row of an existing group is loaded or refused.
        let Some((_, group)) = groups.get_mut(&numbers[1]) else { continue };
        let lease = is_right.then(|| {
            let (attempts, ids) = (u32::try_from(numbers[4]).ok()?, unpack_ids(&ids)?);
            Some(DeliveredBatch { consumer: numbers[2], delivered_ms: numbers[3].cast_unsigned(), attempts, ids })
        });
        let Some(lease) = lease.flatten() else {
            let group = &group.name;
            return Err(corrupt(format!("pending entries of group `{group}` are damaged (lease {})", numbers[0])));
        };
        group.put_lease(numbers[0], lease);
    }
    Ok(())
}
