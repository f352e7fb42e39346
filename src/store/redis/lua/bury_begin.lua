-- Begins to move entries to dead letters in another part of the cluster: those that the consumer still holds count as
-- delivered just now, without a further attempt, and it is noted where they go.
-- KEYS: the stream, where that is noted. ARGV: group, consumer, for how many milliseconds it is noted, the stream of
--   dead letters, ids. Returns the ids that the consumer does not hold.
local call, stream, group, consumer = redis.call, KEYS[1], ARGV[1], ARGV[2]
local own, noted, not_owned = {}, {}, {}
for i = 5, #ARGV do
  local id = ARGV[i]
  local row = call('XPENDING', stream, group, id, id, 1)[1]
  if not row or row[2] ~= consumer then
    not_owned[#not_owned + 1] = id
  else
    noted[#noted + 1], noted[#noted + 2] = group .. '/' .. id, ARGV[4]
    -- An entry whose body is gone is left for a claim to find: XCLAIM would drop it silently.
    if #call('XRANGE', stream, id, id) > 0 then own[#own + 1] = id end
  end
end
if #noted > 0 then
  call('HSET', KEYS[2], unpack(noted))
  call('PEXPIRE', KEYS[2], ARGV[3])
end
if #own > 0 then
  own[#own + 1] = 'JUSTID'
  call('XCLAIM', stream, group, consumer, 0, unpack(own))
end
return not_owned
