-- Resets the idle time of pending entries that the consumer still holds, without a further attempt.
-- KEYS: the stream. ARGV: group, consumer, ids. Returns the ids that the consumer does not hold.
local call, stream, group, consumer = redis.call, KEYS[1], ARGV[1], ARGV[2]
local own, not_owned = {}, {}
for i = 3, #ARGV do
  local id = ARGV[i]
  local row = call('XPENDING', stream, group, id, id, 1)[1]
  if not row or row[2] ~= consumer then
    not_owned[#not_owned + 1] = id
  elseif #call('XRANGE', stream, id, id) > 0 then
    -- Skip an entry whose body is gone: XCLAIM would drop it silently, a claim reports it.
    own[#own + 1] = id
  end
end
if #own > 0 then
  own[#own + 1] = 'JUSTID'
  call('XCLAIM', stream, group, consumer, 0, unpack(own))
end
return not_owned
