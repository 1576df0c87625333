-- What each request took of the engine: txn.input, txn.cached and txn.output, in tokens, for its line in the log.
--
-- An engine tells the tokens of a stream at its end, to those who ask for it. Here each stream is asked to tell them as
-- it goes, so that one that is broken off counts too. What its client did not ask for is taken out again.
-- txn.estimated is true where only the events of a stream could be counted.

local ASK = ',"stream_options":{"include_usage":true,"continuous_usage_stats":true}'
-- The length of a request is announced before it can be told whether it is a stream.
local BLANKS = string.rep(" ", #ASK)
local OPENAI = { ["/v1/chat/completions"] = true, ["/v1/completions"] = true }
local METERED = {
  ["/v1/chat/completions"] = true,
  ["/v1/completions"] = true,
  ["/v1/messages"] = true,
  ["/v1/responses"] = true,
}
-- Characters of a request without its messages; one with more is passed on as it is.
local LARGEST = 16384
-- Characters of an event that are waited for; half of HAProxy's buffer.
local EVENT = 8192
-- Characters that are looked at again with those that follow: the usage may be split between them.
local OVERLAP = 1024

local byte, find, gsub, match, sub = string.byte, string.find, string.gsub, string.match, string.sub

-- A JSON object as it comes, without its long strings and without what is nested deeper than two levels.
local Skeleton = {}
Skeleton.__index = Skeleton

function Skeleton.new()
  return setmetatable({ depth = 0, parts = {}, size = 0, text = nil, backslashes = 0 }, Skeleton)
end

function Skeleton:keep(text)
  if self.depth <= 2 and self.size <= LARGEST then
    self.parts[#self.parts + 1] = text
    self.size = self.size + #text
  end
end

-- Returns where the brace is that ends the object; nil where that is still to come.
function Skeleton:read(data)
  local at = 1
  while at <= #data do
    if self.text then
      at = self:read_string(data, at)
    else
      at = self:read_structure(data, at)
      if at and self.depth == 0 and not self.text then return at - 1 end
    end
    if not at then return nil end
  end
  return nil
end

-- Both return where to read on.
function Skeleton:read_string(data, at)
  local quote = find(data, '"', at, true)
  local last = (quote or #data + 1) - 1
  local before = last
  while before >= at and byte(data, before) == 92 do before = before - 1 end
  local backslashes = last - before
  if before < at then backslashes = backslashes + self.backslashes end
  if #self.text < 64 then self.text = self.text .. sub(data, at, math.min(last, at + 63)) end
  self.backslashes = quote and 0 or backslashes
  if quote and backslashes % 2 == 0 then
    self:keep(find(self.text, "^[%w_]*$") and '"' .. self.text .. '"' or '""')
    self.text = nil
  end
  return quote and quote + 1
end

function Skeleton:read_structure(data, at)
  local mark = find(data, '["{}%[%]]', at)
  self:keep(sub(data, at, (mark or #data + 1) - 1))
  if not mark then return nil end
  local char = sub(data, mark, mark)
  if char == '"' then
    self.text = ""
  elseif char == "{" or char == "[" then
    self:keep(char)
    self.depth = self.depth + 1
  else
    self.depth = self.depth - 1
    self:keep(char)
  end
  return mark + 1
end

-- Whether it asks for a stream, for its tokens at the end, and for them as it goes.
function Skeleton:asks()
  if self.size > LARGEST then return false end
  local inner = match(table.concat(self.parts), "^%s*{(.*)}$") or ""
  local options = match(inner, '"stream_options"%s*:%s*(%b{})') or ""
  local top = gsub(gsub(inner, "%b{}", ""), "%b[]", "")
  local function set(name) return find(options, '"' .. name .. '"%s*:%s*true') ~= nil end
  local at_end = set("include_usage")
  return find("," .. top, ',%s*"stream"%s*:%s*true') ~= nil, at_end, at_end and set("continuous_usage_stats")
end

local Accounts = { id = "accounts", flags = filter.FLT_CFG_FL_HTX }
Accounts.__index = Accounts

function Accounts:new()
  -- As long as nothing was added, nothing is to be taken out.
  return setmetatable({ at_end = true, as_it_goes = true, seen = "", events = 0 }, Accounts)
end

local function header(message, name)
  return (message:get_headers()[name] or {})[0] or ""
end

function Accounts:http_headers(txn, message)
  if message:is_resp() then
    local kind = self.path and header(message, "content-type") or ""
    self.streamed = find(kind, "text/event-stream", 1, true) ~= nil
    if self.streamed or find(kind, "json", 1, true) then filter.register_data_filter(self, message.channel) end
    return
  end
  local path = txn.c:url_dec(txn.f:path()) -- as the engine reads it
  if txn.f:method() ~= "POST" or not METERED[path] then return end
  self.path = path
  if not OPENAI[path] or header(message, "content-encoding") ~= "" then return end
  self.left = tonumber(header(message, "content-length"))
  if self.left and self.left < 2 then return end
  if self.left then message:set_header("content-length", tostring(self.left + #ASK)) end
  self.skeleton = Skeleton.new()
  filter.register_data_filter(self, message.channel)
end

-- Returns how many characters may go on; no value stands for all, with what ends the message.
function Accounts:http_payload(txn, message)
  local data = message:body()
  if not data or #data == 0 then return end
  if not message:is_resp() then return self:question(message, data) end
  if self.streamed then return self:events_of(message, data) end
  -- The figures stand near the end, and may be split.
  self.seen = self.seen .. data
  self:note(self.seen)
  self.seen = sub(self.seen, -OVERLAP)
end

-- Before the line is logged, however the request ends. Later figures count, since they go on growing.
function Accounts:end_analyze(txn, channel)
  if not channel:is_resp() or not self.path then return end
  for _, usage in ipairs({ self.first, self.usage }) do
    local function number(name) return tonumber(match(usage, '"' .. name .. '":%s*(%d+)')) end
    local read = number("cache_read_input_tokens")
    local input = number("prompt_tokens") or number("input_tokens")
    -- Anthropic's input holds neither what was cached nor what was written into the cache.
    local rest = (read or 0) + (number("cache_creation_input_tokens") or 0)
    if input then txn:set_var("txn.input", input + rest) end
    local cached = number("cached_tokens") or read
    if cached then txn:set_var("txn.cached", cached) end
    local output = number("completion_tokens") or number("output_tokens")
    if output then txn:set_var("txn.output", output) end
  end
  if self.events > 0 and not self.told then
    txn:set_var("txn.output", self.events)
    txn:set_var("txn.estimated", true)
  end
end

function Accounts:question(message, data)
  if not self.skeleton then return end
  if not self.added then
    local brace = self.skeleton:read(data)
    if self.left then self.left = self.left - #data end
    if brace then
      self.added, self.behind = BLANKS, #data - brace
      local streamed, at_end, as_it_goes = self.skeleton:asks()
      if streamed then
        self.added, self.behind = ASK, self.behind + 1
        self.at_end, self.as_it_goes = at_end, as_it_goes
      end
    elseif self.left and self.left <= 0 then
      self.added, self.behind = BLANKS, 0
    else
      return
    end
  end
  local place = #data - self.behind
  if message:insert(self.added, place) > 0 then
    self.skeleton = nil
    return
  end
  -- The buffer is full: once what stands before has gone there is room.
  return place
end

-- Keeps the last figures, and the first ones, which alone may tell the input.
function Accounts:note(text)
  local at = find(text, '"usage":', 1, true)
  while at do
    local usage = match(text, "^%s*(%b{})", at + 8)
    if usage then
      self.first = self.first or usage
      self.usage = usage
    end
    at = find(text, '"usage":', at + 8, true)
  end
end

-- Events of which a part is still to come are kept back until it is there.
function Accounts:events_of(message, data)
  local whole = #data
  if sub(data, -2) ~= "\n\n" and not message:eom() then
    whole = match(data, ".*\n\n()")
    if not whole then return #data < EVENT and 0 or #data end
    whole = whole - 1
  end
  local events = whole == #data and data or sub(data, 1, whole)
  self:note(events)
  local left = whole
  if not OPENAI[self.path] then
    self:estimate(events)
  elseif not self.as_it_goes then
    local cleaned = self:cleaned(events)
    left = #cleaned
    if left ~= whole then message:set(cleaned, 0, whole) end
  end
  if whole < #data then return left end
end

-- Without what the client did not ask for. The last event has no choices.
function Accounts:cleaned(events)
  if not find(events, '"choices":%s*%[%s*%]') then return (gsub(events, ',%s*"usage":%s*%b{}', "")) end
  return (gsub(events, "[^\n]+\n\n", function(event)
    if find(event, '"choices":%s*%[%s*%]') then return not self.at_end and "" or nil end
    return (gsub(event, ',%s*"usage":%s*%b{}', ""))
  end))
end

-- These interfaces tell the output at the end alone: until then, an event that brings some is taken for a token.
function Accounts:estimate(events)
  self.told = self.told or find(events, '"message_delta"', 1, true) or find(events, '"response.completed"', 1, true)
  local mark = self.path == "/v1/messages" and 'content_block_delta"' or '.delta"'
  local at = find(events, mark, 1, true)
  while at do
    self.events = self.events + 1
    at = find(events, mark, at + #mark, true)
  end
end

core.register_filter("accounts", Accounts, function(accounts) return accounts end)
