-- Moves pending entries that the consumer still holds to the dead letters. Appends first and acknowledges then, so that
-- a failed append leaves the entry pending. A repeated run finds nothing pending and appends nothing.
-- KEYS: the stream, its account, the dead-letter stream. ARGV: group, consumer, then per entry its id, the number of
--   names and values of its record, and these.
-- Returns how many the consumer does not hold.
local call, stream, dead, group, consumer = redis.call, KEYS[1], KEYS[3], ARGV[1], ARGV[2]
local not_owned, i = 0, 3
while i <= #ARGV do
  local id, size = ARGV[i], tonumber(ARGV[i + 1])
  local row = call('XPENDING', stream, group, id, id, 1)[1]
  if row and row[2] == consumer then
    call('XADD', dead, '*', unpack(ARGV, i + 2, i + 1 + size))
    call('HINCRBY', KEYS[2], 'dead:' .. group, call('XACK', stream, group, id))
  else
    not_owned = not_owned + 1
  end
  i = i + 2 + size
end
return not_owned
