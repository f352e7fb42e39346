-- Removes the oldest entries, settled or not, and counts them as lost for each group that had not settled them. One
-- bounded step. KEYS: the stream, its account. ARGV: the number of entries to keep.
-- Returns how many were removed, 1 if there are more to remove, the first and the last id, and per group with losses its
-- name, the number of pending and the number of undelivered ones.
local call, stream, account, keep = redis.call, KEYS[1], KEYS[2], tonumber(ARGV[1])
if call('EXISTS', stream) == 0 then return {0, 0, '', '', {}} end
local info = call('XINFO', 'STREAM', stream)
local length = field(info, 'length')
if length <= keep then return {0, 0, '', '', {}} end
local want = math.min(length - keep, step(info))
local oldest = call('XRANGE', stream, '-', '+', 'COUNT', want + 1)
local last, is_victim = oldest[want][1], {}
for i = 1, want do is_victim[oldest[i][1]] = true end

local losers = {}
for _, group in ipairs(call('XINFO', 'GROUPS', stream)) do
  local name, delivered = field(group, 'name'), field(group, 'last-delivered-id')
  local pending, missed = {}, 0
  -- Pending entries whose bodies were gone before are reported by a claim.
  for _, row in ipairs(call('XPENDING', stream, name, '-', last, want * 2)) do
    if is_victim[row[1]] and #pending < 1000 then pending[#pending + 1] = row[1] end
  end
  for i = want, 1, -1 do
    if not less(delivered, oldest[i][1]) then break end
    missed = missed + 1
  end
  if #pending + missed > 0 then losers[#losers + 1] = {name, pending, missed} end
end

-- A full server lets a script continue after its first write, so the counts come after the trim.
if oldest[want + 1] then
  call('XTRIM', stream, 'MINID', oldest[want + 1][1])
else
  call('XTRIM', stream, 'MAXLEN', 0)
end
count_removed(account, want)
local told = {}
for i, loser in ipairs(losers) do
  local name, pending, missed = unpack(loser)
  if #pending > 0 then call('XACK', stream, name, unpack(pending)) end
  call('HINCRBY', account, 'dropped:' .. name, #pending + missed)
  if missed > 0 then recount(stream, name) end
  told[i] = {name, #pending, missed}
end
return {want, length - want > keep and 1 or 0, oldest[1][1], last, told}
