-- Bodies of a file in a drawn order (wrk 4.1). BODIES: the file, one body a line. RATE: requests a
-- second over CONNECTIONS, each a Poisson process; none: the next request follows the answer.
-- WRK_PATH: of the request.
local bodies = {}
for line in io.lines(os.getenv("BODIES")) do bodies[#bodies + 1] = line end

local rate, connections = tonumber(os.getenv("RATE")), tonumber(os.getenv("CONNECTIONS"))
if rate then
  function delay() return -math.log(1 - math.random()) * 1000 * connections / rate end
end

function init() math.randomseed(1) end

function request()
  return wrk.format("POST", os.getenv("WRK_PATH"), {["content-type"] = "application/json"},
                    bodies[math.random(#bodies)])
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    'JSON {"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "failed": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, e.connect + e.read + e.write + e.status + e.timeout))
end
