-- Fetches the next entries of a group, without waiting. KEYS: the stream. ARGV: group, consumer, the maximum number.
-- Returns the entries, or if there are none, the last id of the stream: entries after it are new.
local call, stream = redis.call, KEYS[1]
local read = call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', ARGV[3], 'STREAMS', stream, '>')
if read and read[1] then return {read[1][2], ''} end
local info = call('XINFO', 'STREAM', stream)
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then return {{}, info[i + 1]} end
end
return {{}, '0-0'}
