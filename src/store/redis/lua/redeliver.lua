-- Redelivers abandoned pending entries: appends each again at the end of the stream, for this group only, and then
-- acknowledges it. An entry with too many deliveries is claimed instead, without a further delivery, so that the caller
-- can give it up. An entry with too many names and values is claimed as well, so that the caller can append it.
-- KEYS: the stream, its account. ARGV: group, the claiming consumer, minimum idle time in milliseconds, the first id, the
--   maximum of entries to act on, of entries to scan and of bytes to act on, the number of deliveries from which on an
--   entry is claimed, the maximum of names and values of one entry, and the names of three fields: the group that an
--   entry is for, its first id, and its earlier deliveries.
-- Returns the number of redelivered entries, the number acknowledged because they are for another group, the lost ids,
--   the entries with too many deliveries, the deliveries of each, and the last scanned id if there may be more after it;
--   then the entries that are too large, and the deliveries of each.
local call, stream, group, consumer, idle = redis.call, KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local wanted, scan, room = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local limit, widest = tonumber(ARGV[8]), tonumber(ARGV[9])
local for_group, first_id, deliveries = ARGV[10], ARGV[11], ARGV[12]
local handed_on, foreign, lost, taken, counts, more = 0, 0, {}, {}, {}, ''
local wide, wide_counts = {}, {}

local function act(id, count)
  local entry = call('XRANGE', stream, id, id)[1]
  if not entry then
    call('XACK', stream, group, id)
    lost[#lost + 1] = id
    return
  end
  local fields, copy, target, first, before = entry[2], {}, nil, id, 0
  for i = 1, #fields, 2 do
    local name, value = fields[i], fields[i + 1]
    room = room - #name - #value
    if name == for_group then
      target = value
    elseif name == first_id then
      first = value
    elseif name == deliveries then
      -- Other programs can write this field: only a plain number is valid.
      before = #value <= 9 and value:match('^%d+$') and tonumber(value) or 0
    else
      copy[#copy + 1], copy[#copy + 2] = name, value
    end
  end
  if target and target ~= group then
    call('XACK', stream, group, id)
    foreign = foreign + 1
    return
  end
  if before + count >= limit then
    call('XCLAIM', stream, group, consumer, idle, id, 'RETRYCOUNT', count, 'JUSTID')
    taken[#taken + 1] = entry
    counts[#counts + 1] = before + count
  elseif #copy + 6 <= widest then
    local n = #copy
    copy[n + 1], copy[n + 2] = for_group, group
    copy[n + 3], copy[n + 4] = first_id, target and first or id
    copy[n + 5], copy[n + 6] = deliveries, string.format('%d', before + count)
    call('XADD', stream, '*', unpack(copy))
    call('XACK', stream, group, id)
    handed_on = handed_on + 1
  else
    call('XCLAIM', stream, group, consumer, idle, id, 'RETRYCOUNT', count, 'JUSTID')
    wide[#wide + 1] = entry
    wide_counts[#wide_counts + 1] = before + count
  end
end

local acted = 0
local rows = call('XPENDING', stream, group, ARGV[4], '+', scan)
for i = 1, #rows do
  local id, idle_for, count = rows[i][1], rows[i][3], rows[i][4]
  if idle_for >= idle then
    act(id, count)
    acted = acted + 1
  end
  if acted == wanted or room <= 0 or i == scan then
    more = id
    break
  end
end
local function count(counter, by)
  if by > 0 then call('HINCRBY', KEYS[2], counter .. ':' .. group, by) end
end
count('acknowledged', handed_on)
count('filtered', foreign)
count('trimmed_pending', #lost)
return {handed_on, foreign, lost, taken, counts, more, wide, wide_counts}
