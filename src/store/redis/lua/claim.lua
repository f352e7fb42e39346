-- Claims pending entries that have been idle for long enough, and finds those whose bodies are gone.
-- KEYS: the stream, its account, and in a cluster the hash of destinations of dead letters in other slots.
-- ARGV: group, consumer, minimum idle time in milliseconds, then either
--   'ids' and the ids, or 'from', the first id, the maximum to claim, the maximum to scan, and the maximum to claim
--   together with an entry that was delivered once, twice, or more often.
-- Returns the claimed entries, the earlier deliveries of each, the lost ids, the last scanned id if there may be more
--   after it, the deliveries of that entry if it was skipped because of the isolation limits, and, if any entry was
--   being moved to another slot, the dead-letter stream of each claimed entry, or an empty text.
local call, stream, group, consumer, idle = redis.call, KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local ids, attempts, more, left = {}, {}, '', 0
local function consider(row)
  if row[3] >= idle then
    ids[#ids + 1] = row[1]
    attempts[row[1]] = row[4]
  end
end
if ARGV[4] == 'ids' then
  for i = 5, #ARGV do
    local row = call('XPENDING', stream, group, ARGV[i], ARGV[i], 1)[1]
    if row and not attempts[row[1]] then consider(row) end
  end
else
  local wanted, scan = tonumber(ARGV[6]), tonumber(ARGV[7])
  local rows = call('XPENDING', stream, group, ARGV[5], '+', scan)
  local room = wanted
  for i = 1, #rows do
    local count = rows[i][4]
    if rows[i][3] >= idle and count > 0 then
      room = math.min(room, tonumber(ARGV[7 + math.min(count, 3)]))
      if #ids >= room then
        more, left = rows[i][1], count
        break
      end
    end
    consider(rows[i])
    if #ids == wanted or i == scan then
      more = rows[i][1]
      break
    end
  end
end
if #ids == 0 then return {{}, {}, {}, more, left, {}} end
local taken, counts, lost, present = {}, {}, {}, {}
for _, entry in ipairs(call('XCLAIM', stream, group, consumer, idle, unpack(ids))) do
  -- For an entry whose body is gone, servers before 7.0 reply nil; newer ones remove it from the pending entries.
  if entry and entry[2] then
    taken[#taken + 1] = entry
    counts[#counts + 1] = attempts[entry[1]]
    present[entry[1]] = true
  end
end
for _, id in ipairs(ids) do
  if not present[id] and #call('XRANGE', stream, id, id) == 0 then
    call('XACK', stream, group, id)
    lost[#lost + 1] = id
  end
end
if #lost > 0 then call('HINCRBY', KEYS[2], 'trimmed_pending:' .. group, #lost) end
local moving = {}
if KEYS[3] and call('EXISTS', KEYS[3]) == 1 then
  for i, entry in ipairs(taken) do moving[i] = call('HGET', KEYS[3], group .. '/' .. entry[1]) or '' end
end
return {taken, counts, lost, more, left, moving}
