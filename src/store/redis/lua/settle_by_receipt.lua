-- Acknowledges or holds pending entries with valid receipts: pending on that consumer, with that number of deliveries,
-- and idle for less than the limit.
-- KEYS: the stream, its account. ARGV: group, the limit in milliseconds, then per entry its id, the consumer and the
--   number of deliveries of its receipt, the new holder (empty: acknowledge), and the lease in milliseconds.
-- Returns for each entry, in order, 1 if its receipt was valid.
local call, stream, group, limit = redis.call, KEYS[1], ARGV[1], tonumber(ARGV[2])
local good, acknowledged = {}, 0
for i = 3, #ARGV, 5 do
  local id, holder = ARGV[i], ARGV[i + 3]
  local row = call('XPENDING', stream, group, id, id, 1)[1]
  local is_good = row and row[2] == ARGV[i + 1] and row[4] == tonumber(ARGV[i + 2]) and row[3] < limit
  if is_good and holder == '' then
    acknowledged = acknowledged + call('XACK', stream, group, id)
  elseif is_good then
    -- Skip an entry whose body is gone: XCLAIM would drop it silently, a claim reports it.
    is_good = #call('XRANGE', stream, id, id) > 0
    if is_good then
      local idle = string.format('%.0f', math.max(limit - tonumber(ARGV[i + 4]), 0))
      call('XCLAIM', stream, group, holder, 0, id, 'IDLE', idle, 'RETRYCOUNT', row[4], 'JUSTID')
    end
  end
  good[#good + 1] = is_good and 1 or 0
end
if acknowledged > 0 then call('HINCRBY', KEYS[2], 'acknowledged:' .. group, acknowledged) end
return good
