-- Acknowledges, re-arms or releases pending entries, if the consumer still holds them.
-- KEYS: the stream, its account. ARGV: group, consumer, then per entry its id, the action ('ack', 'filter', 'retry' or
--   'release'), and its new idle time in milliseconds.
-- Returns how many the consumer does not hold.
local call, stream, group, consumer = redis.call, KEYS[1], ARGV[1], ARGV[2]
local done, not_owned = {ack = {}, filter = {}}, 0
for i = 3, #ARGV, 3 do
  local id, what, idle = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local row = call('XPENDING', stream, group, id, id, 1)[1]
  if not row or row[2] ~= consumer then
    not_owned = not_owned + 1
  elseif done[what] then
    table.insert(done[what], id)
  elseif #call('XRANGE', stream, id, id) > 0 then
    -- Skip an entry whose body is gone: XCLAIM would drop it silently, a claim reports it.
    if what == 'retry' then
      call('XCLAIM', stream, group, consumer, 0, id, 'IDLE', idle, 'JUSTID')
    else
      -- An entry with that idle time was released before: this settlement is a repetition.
      local count = row[3] >= tonumber(idle) and row[4] or math.max(row[4] - 1, 0)
      call('XCLAIM', stream, group, consumer, 0, id, 'IDLE', idle, 'RETRYCOUNT', count, 'JUSTID')
    end
  end
end
local function acknowledge(ids, counter)
  if #ids > 0 then call('HINCRBY', KEYS[2], counter .. group, call('XACK', stream, group, unpack(ids))) end
end
acknowledge(done.ack, 'acknowledged:')
acknowledge(done.filter, 'filtered:')
return not_owned
