"""What the store runs by itself, in Lua: each script is one step that nobody else comes between.

Every script may run twice, as happens when its answer was lost: the second run changes nothing and
answers the same. Keys, behind the prefix P of the database:

    P:s:ID                 hash: the stream's record: who asked for what
    P:r:CLIENT:REQUEST_ID  the id of the stream that the request started
    P:e:ID                 stream: the events; the entry of seq n is (n + 1)-0
    P:l:ID                 the lease: who works for it; with "?" before it, who has yet to find a
                           worker: any may take it, also the one whose lease has run out
    P:o:CLIENT             sorted set: the client's streams that have ended, by time
    P:sizes                hash: bytes of those, by client; their sum is P:size
    P:w:ID                 sorted set: servers with readers of it, by when they last said so
    P:version              of this layout

Channels: P:n:ID has what comes in a stream, P:h:HOLDER what a holder of leases must know. Some keys
are made of what is found in others, so the store must be one server, or one with its replicas, and
no Redis Cluster.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Final

__all__ = [
    "APPEND",
    "BEAT",
    "CANCEL",
    "CREATE",
    "FORGET",
    "LAYOUT",
    "LEAVE",
    "OTHER_LAYOUT",
    "READ",
    "RELEASE",
    "SCRIPTS",
    "TAKE",
    "Script",
]

LAYOUT: Final = "1"
"""Of keys and scripts: processes with another one keep away from the database."""
OTHER_LAYOUT: Final = "LAYOUT"
"""What an answer begins with where it has another one."""


@dataclass(frozen=True, slots=True)
class Script:
    """A script, and `sha`, the name that the store knows it by."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False)
        object.__setattr__(self, "sha", digest.hexdigest())


CREATE: Final = Script(
    f"""
local layout, other = '{LAYOUT}', '{OTHER_LAYOUT}'"""
    """
-- P, id, request key, holder, lease ms, ttl ms, then the record's fields. Returns the stream's id.
-- A store that was emptied may have become another version's, and is ours again where it has not.
local P, id, request, holder, lease_ms, ttl_ms = unpack(ARGV, 1, 6)
if redis.call('SETNX', P .. ':version', layout) == 0 then
  local version = redis.call('GET', P .. ':version')
  if version ~= layout then return redis.error_reply(other .. ' ' .. version) end
end
local known = redis.call('GET', request)
if known and known ~= id and redis.call('EXISTS', P .. ':s:' .. known) == 1 then return known end
if known ~= id then
  redis.call('SET', request, id, 'PX', ttl_ms)
  redis.call('HSET', P .. ':s:' .. id, unpack(ARGV, 7))
  redis.call('PEXPIRE', P .. ':s:' .. id, ttl_ms)
  redis.call('SET', P .. ':l:' .. id, holder, 'PX', lease_ms)
end
return id
"""
)

TAKE: Final = Script("""
-- P, id, holder, lease ms, 1 to take it from another, then digest and name of the model that is to
-- answer, or "". Returns 1 with the lease, 2 where the stream is cancelled, else 0; -1 where there
-- is no such stream; digest and name of the model that began with the answer, if it is another.
local P, id, holder, lease_ms, by_force, model, name = unpack(ARGV)
local record = P .. ':s:' .. id
if redis.call('EXISTS', record) == 0 then return -1 end
local now = redis.call('GET', P .. ':l:' .. id)
if by_force == '0' and now and now ~= holder and string.sub(now, 1, 1) ~= '?' then return 0 end
if model ~= '' then
  local began = redis.call('HMGET', record, 'model', 'model_name')
  local has_begun = began[1] and redis.call('XLEN', P .. ':e:' .. id) > 0
  if has_begun and began[1] ~= model then return began end
  redis.call('HSET', record, 'model', model, 'model_name', name)
end
redis.call('SET', P .. ':l:' .. id, holder, 'PX', lease_ms)
return 1 + redis.call('HEXISTS', record, 'cancelled')
""")

APPEND: Final = Script("""
-- P, id, holder, lease ms, seq, event; of a last event also request key, client, request id, ttl
-- ms, bytes, most bytes. Returns the number of events where the log has it, -1 where the stream is
-- another's, -2 where there is none, and -3 - n where the log has only n events before it.
local P, id, holder, lease_ms, seq, event = unpack(ARGV, 1, 6)
local events, lease = P .. ':e:' .. id, P .. ':l:' .. id
seq = tonumber(seq)
local n = redis.call('XLEN', events)
local now = redis.call('GET', lease)
if now and now ~= holder and string.sub(now, 1, 1) ~= '?' then return -1 end
if n > seq then
  local entry = redis.call('XRANGE', events, (seq + 1) .. '-0', (seq + 1) .. '-0')[1]
  if entry and entry[2][2] == event then return n end
  return -1
end
if redis.call('EXISTS', P .. ':s:' .. id) == 0 then return -2 end
if n < seq then return -3 - n end
redis.call('XADD', events, (seq + 1) .. '-0', 'e', event)
redis.call('PUBLISH', P .. ':n:' .. id, event)
if not ARGV[7] then
  redis.call('SET', lease, holder, 'PX', lease_ms)
  if n == 0 then redis.call('PEXPIRE', events, redis.call('PTTL', P .. ':s:' .. id)) end
  return n + 1
end
local request, client, request_id, ttl_ms, bytes, most = unpack(ARGV, 7)
redis.call('DEL', lease, P .. ':w:' .. id)
for _, key in ipairs({events, P .. ':s:' .. id, request}) do redis.call('PEXPIRE', key, ttl_ms) end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local function charge(client, bytes)
  redis.call('INCRBY', P .. ':size', bytes)
  if redis.call('HINCRBY', P .. ':sizes', client, bytes) == 0 then
    redis.call('HDEL', P .. ':sizes', client)
  end
end
local function drop(client, member)
  local size, id, request_id = string.match(member, '^(%d+) (%S+) (%S+)$')
  redis.call('ZREM', P .. ':o:' .. client, member)
  charge(client, -size)
  redis.call('DEL', P .. ':e:' .. id, P .. ':s:' .. id, P .. ':r:' .. client .. ':' .. request_id)
end
redis.call('ZADD', P .. ':o:' .. client, now_ms, bytes .. ' ' .. id .. ' ' .. request_id)
charge(client, bytes)
while tonumber(redis.call('GET', P .. ':size')) > tonumber(most) do
  local sizes, largest, size = redis.call('HGETALL', P .. ':sizes'), nil, -1
  for i = 1, #sizes, 2 do
    if tonumber(sizes[i + 1]) > size then largest, size = sizes[i], tonumber(sizes[i + 1]) end
  end
  if not largest then redis.call('SET', P .. ':size', 0) break end
  local key = P .. ':o:' .. largest
  local old = redis.call('ZRANGEBYSCORE', key, '-inf', now_ms - ttl_ms, 'LIMIT', 0, 1000)
  if #old == 0 then old = redis.call('ZRANGE', key, 0, 0) end
  if #old == 0 then charge(largest, -size) end
  for _, member in ipairs(old) do drop(largest, member) end
end
redis.call('PEXPIRE', P .. ':o:' .. client, 2 * ttl_ms)
return n + 1
""")

BEAT: Final = Script("""
-- P, holder, lease ms, ttl ms, reader ms, number of works, number of streams kept for a worker,
-- then the ids of those and of streams that are read. Renews the leases of the first two. Returns
-- for each of them 1 where it is the holder's, 2 where it is cancelled too, 0 where it is another's
-- and 3 where there is no such stream; and for each read the number of its events: -1 - that where
-- nobody works for it, and false where there is no such stream.
local P, holder, lease_ms, ttl_ms, reader_ms = unpack(ARGV, 1, 5)
local works, kept, answers = tonumber(ARGV[6]), tonumber(ARGV[7]), {}
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 8, #ARGV do
  local id, number = ARGV[i], i - 7
  local record, lease, readers = P .. ':s:' .. id, P .. ':l:' .. id, P .. ':w:' .. id
  local now, answer = redis.call('GET', lease), 1
  if number <= works + kept then
    local mine = number <= works and holder or '?' .. holder
    local waits = now and number <= works and string.sub(now, 1, 1) == '?'
    if now and now ~= mine and not waits then
      answer = 0
    elseif redis.call('EXISTS', record) == 0 then
      answer = 3
    else
      redis.call('SET', lease, mine, 'PX', lease_ms)
      local fields = redis.call('HMGET', record, 'request_key', 'cancelled', 'leave', 'idle_ms')
      for _, key in ipairs({record, P .. ':e:' .. id, fields[1]}) do
        redis.call('PEXPIRE', key, fields[4] or ttl_ms)
      end
      if fields[3] and not fields[2] and redis.call('EXISTS', readers) == 1 then
        if redis.call('ZCOUNT', readers, now_ms - reader_ms, '+inf') == 0 then
          redis.call('HSET', record, 'cancelled', 1)
          fields[2] = '1'
        end
      end
      if fields[2] then answer = 2 end
    end
  elseif redis.call('EXISTS', record) == 0 then
    answer = false
  else
    answer = redis.call('XLEN', P .. ':e:' .. id)
    if not now then answer = -1 - answer end
  end
  answers[number] = answer
end
return answers
""")

CANCEL: Final = Script("""
-- P, id. Notes it for whoever works for the stream next, and tells who does now.
local P, id = unpack(ARGV)
if redis.call('EXISTS', P .. ':s:' .. id) == 0 then return 0 end
redis.call('HSET', P .. ':s:' .. id, 'cancelled', 1)
local now = redis.call('GET', P .. ':l:' .. id)
if now then redis.call('PUBLISH', P .. ':h:' .. string.gsub(now, '^?', ''), id) end
return 1
""")

READ: Final = Script("""
-- P, server, ttl ms, then ids of streams: the server has readers of them.
local P, server, ttl_ms = unpack(ARGV, 1, 3)
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 4, #ARGV do
  if redis.call('EXISTS', P .. ':s:' .. ARGV[i]) == 1 then
    redis.call('ZADD', P .. ':w:' .. ARGV[i], now_ms, server)
    redis.call('PEXPIRE', P .. ':w:' .. ARGV[i], ttl_ms)
  end
end
return 1
""")

LEAVE: Final = Script("""
-- P, id, server, reader ms. The server has no reader of the stream any more; returns 1 where no
-- other has one either.
local P, id, server, reader_ms = unpack(ARGV)
local time = redis.call('TIME')
redis.call('ZREM', P .. ':w:' .. id, server)
local since = time[1] * 1000 + math.floor(time[2] / 1000) - reader_ms
return redis.call('ZCOUNT', P .. ':w:' .. id, since, '+inf') == 0 and 1 or 0
""")

RELEASE: Final = Script("""
-- P, id, holder. Ends a lease, if it is the holder's.
local lease = ARGV[1] .. ':l:' .. ARGV[2]
if redis.call('GET', lease) == ARGV[3] then return redis.call('DEL', lease) end
return 0
""")

FORGET: Final = Script("""
-- P, id, holder, request key, message. Lets the stream be found no more; the message says why.
local P, id, holder, request, message = unpack(ARGV)
local now = redis.call('GET', P .. ':l:' .. id)
if now and now ~= holder and now ~= '?' .. holder then return 0 end
redis.call('PUBLISH', P .. ':n:' .. id, message)
if redis.call('GET', request) == id then redis.call('DEL', request) end
return redis.call('DEL', P .. ':s:' .. id, P .. ':e:' .. id, P .. ':l:' .. id, P .. ':w:' .. id)
""")

SCRIPTS: Final = (CREATE, TAKE, APPEND, BEAT, CANCEL, READ, LEAVE, RELEASE, FORGET)
