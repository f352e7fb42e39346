-- Begins the move of entries to a dead-letter stream in another slot: resets the idle time of the entries that the
-- consumer still holds, without a further attempt, and records their destination.
-- KEYS: the stream, the hash of destinations. ARGV: group, consumer, the lifetime of the hash in milliseconds, the
--   dead-letter stream, ids. Returns the ids that the consumer does not hold.
local call, stream, group, consumer = redis.call, KEYS[1], ARGV[1], ARGV[2]
local own, noted, not_owned = {}, {}, {}
for i = 5, #ARGV do
  local id = ARGV[i]
  local row = call('XPENDING', stream, group, id, id, 1)[1]
  if not row or row[2] ~= consumer then
    not_owned[#not_owned + 1] = id
  else
    noted[#noted + 1], noted[#noted + 2] = group .. '/' .. id, ARGV[4]
    -- Skip an entry whose body is gone: XCLAIM would drop it silently, a claim reports it.
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
