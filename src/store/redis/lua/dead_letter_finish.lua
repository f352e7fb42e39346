-- Ends the move: acknowledges the entries, if the consumer still holds them.
-- KEYS: the stream, its account, the hash of destinations. ARGV: group, consumer, ids.
-- Returns how many the consumer does not hold.
local call, stream, group, consumer = redis.call, KEYS[1], ARGV[1], ARGV[2]
local done, noted, not_owned = {}, {}, 0
for i = 3, #ARGV do
  local row = call('XPENDING', stream, group, ARGV[i], ARGV[i], 1)[1]
  if row and row[2] == consumer then
    done[#done + 1], noted[#noted + 1] = ARGV[i], group .. '/' .. ARGV[i]
  else
    not_owned = not_owned + 1
  end
end
if #done > 0 then
  call('HINCRBY', KEYS[2], 'dead:' .. group, call('XACK', stream, group, unpack(done)))
  call('HDEL', KEYS[3], unpack(noted))
end
return not_owned
