"""The common work of python3-etcd3gw (JSON gateway). Arguments: endpoint, beginning of values, folder for files.

Each line of the output is a JSON list: what was done, and what came back, without what differs from run to run.
"""
import json
import os
import sys
from urllib.parse import urlsplit

import etcd3gw
from etcd3gw.exceptions import Etcd3Exception

endpoint, secret, _ = sys.argv[1:]
url = urlsplit(endpoint)


def client(**more):
    return etcd3gw.Etcd3Client(
        host=url.hostname, port=url.port, protocol=url.scheme, timeout=20, ca_cert=os.environ.get("ETCD_CA"),
        cert_cert=os.environ.get("ETCD_CERT"), cert_key=os.environ.get("ETCD_KEY"), **{"api_path": "/v3/", **more})


c = client()


def v(n):
    return f"{secret}-{n}".encode()


def b64(data):
    return etcd3gw.utils._encode(data)


def plain(x):
    if isinstance(x, bytes):
        return x.decode("latin-1")
    if isinstance(x, dict):
        return {k: plain(y) for k, y in x.items() if k not in ("lease", "name", "clientURLs", "peerURLs")}
    if isinstance(x, (list, tuple)):
        return [plain(y) for y in x]
    return x


def say(what, got):
    print(json.dumps([what, plain(got)], sort_keys=True), flush=True)


def refused(what, f, *args, **kwargs):
    try:
        say(what, f(*args, **kwargs))
    except Etcd3Exception as e:
        try:
            detail = json.loads(e.detail_text)
            detail = [detail.get("code"), detail.get("message")]
        except ValueError:
            detail = e.detail_text
        say(what, ["refused", type(e).__name__, str(e), detail])


# Keys and values.
say("put", c.put("a", v(1)))
say("get", c.get("a"))
say("get with metadata", c.get("a", metadata=True))
say("get nothing", c.get("nothing"))
say("put empty", c.put("empty", ""))
say("get empty", c.get("empty"))
say("put bytes", c.put("bytes", v(0) + bytes(range(256))))
say("get bytes", c.get("bytes"))
say("put latin", c.put("k\u00e4se", secret + " caf\u00e9"))
say("get latin", c.get("k\u00e4se"))
for i, n in enumerate("30124"):
    c.put(f"dir/{i}", v(n))
say("prefix", c.get_prefix("dir/"))
for target in "key", "version", "create", "mod", "value":
    for order in None, "ascend", "descend":
        say(f"prefix by {target} {order}", c.get_prefix("dir/", sort_target=target, sort_order=order))
end = b64("dir0")
say("limit by value", c.get("dir/", range_end=end, limit=2, sort_target="value", sort_order="descend"))
say("keys by value", c.get("dir/", range_end=end, keys_only=True, metadata=True, sort_target="value", sort_order="ascend"))
say("count", c.get("dir/", range_end=end, count_only=True))
c.put("a", v(2))
say("as of before", c.get("a", revision=2, metadata=True))
say("serializable", c.get("a", serializable=True))
say("create", c.create("created", v(1)))
say("create again", c.create("created", v(2)))

# Compares by VALUE.
say("replace", c.replace("a", v(2), v(3)))
say("replace what it is not", c.replace("a", v(2), v(4)))
say("replace nothing", c.replace("nothing", v(2), v(4)))
say("replaced", c.get("a", metadata=True))
for result in "EQUAL", "NOT_EQUAL", "GREATER", "LESS":
    for operand in v(2), v(3), v(4), b"":
        say(f"{result} {operand[-1:]}", c.transaction({
            "compare": [{"key": b64("a"), "target": "VALUE", "result": result, "value": b64(operand)}],
            "success": [{"request_put": {"key": b64("then"), "value": b64(v(5)), "prev_kv": True}}, {"request_range": {"key": b64("a")}}],
            "failure": [{"request_delete_range": {"key": b64("then"), "prev_kv": True}}, {"request_range": {"key": b64("dir/"), "range_end": end}}],
        }))
say("a range of values", c.transaction({
    "compare": [{"key": b64("dir/"), "range_end": end, "target": "VALUE", "result": "LESS", "value": b64(v(9))}],
    "success": [{"request_txn": {"compare": [{"key": b64("a"), "target": "VALUE", "value": b64(v(3))}], "success": [{"request_range": {"key": b64("a")}}]}}],
}))

# Leases.
lease = c.lease(ttl=600)
say("put with a lease", c.put("leased", v(1), lease=lease))
say("create with a lease", c.create("leased/2", v(2), lease=lease))
say("keys of the lease", sorted(lease.keys()))
say("time to live", 590 < lease.ttl() <= 600)
say("refresh", lease.refresh())
say("revoke", lease.revoke())
say("gone", c.get_prefix("leased"))
say("refresh what is gone", lease.refresh())
refused("revoke what is gone", lease.revoke)

# Locks: released by a compare of the VALUE.
one, two = c.lock("lock", ttl=600), c.lock("lock", ttl=600)
say("acquire", one.acquire())
say("acquire what is held", two.acquire())
say("held", [one.is_acquired(), two.is_acquired()])
say("refresh the lock", one.refresh())
say("release what another holds", two.release())
say("release", one.release())
say("acquire what is free", two.acquire())
say("held by the other", [one.is_acquired(), two.is_acquired()])
say("release by the other", two.release())
with c.lock("lock", ttl=600) as held:
    say("within", held.is_acquired())
say("after", c.get_prefix("/locks/"))

# Watches.
events, cancel = c.watch("watched", prev_kv=True)
for n in 1, 2:
    c.put("watched", v(n))
c.delete("watched")
for _ in range(3):
    e = next(events)
    if "prev_kv" in e:
        e["prev_kv"] = {k: etcd3gw.utils._decode(x) if k in ("key", "value") else x for k, x in e["prev_kv"].items()}
    say("watched", e)
cancel()
before = int(c.status()["header"]["revision"])
c.put("watch/1", v(1))
c.put("watch/2", v(2))
say("watch once from before", c.watch_once("watch/1", timeout=20, start_revision=before + 1))
events, cancel = c.watch_prefix("watch/", start_revision=before + 1)
say("watch a prefix", [next(events), next(events)])
cancel()
try:
    c.watch_once("watch/1", timeout=0.2)
except etcd3gw.exceptions.WatchTimedOut:
    say("watch nothing", "timed out")

# Deletes.
say("delete", c.delete("watch/1"))
say("delete again", c.delete("watch/1"))
say("delete a prefix", c.delete_prefix("watch/"))
say("deleted", c.get_prefix("watch/"))

# The server, and what it refuses.
status = c.status()
say("status", [status["version"].split(".")[:2], status["leader"], status["raftTerm"], status["header"]])
say("members", c.members())
say("all of it", c.get("\0", range_end=b64("\0"), metadata=True))
refused("put no key", c.put, "", v(1))
refused("too large", c.put, "large", v(1) + b"x" * (1600 << 10))
refused("the future", c.get, "a", revision=99999)
refused("compact", c.post, c.get_url("/kv/compaction"), json={"revision": 3})
refused("compact again", c.post, c.get_url("/kv/compaction"), json={"revision": 3})
refused("what was compacted", c.get, "a", revision=2)
refused("twice in one transaction", c.transaction, {"success": [{"request_put": {"key": b64("a"), "value": b64(v(1))}}] * 2})
refused("an older path", client(api_path="/v3beta/").get, "a")
refused("the oldest path", client(api_path="/v3alpha/").get, "a")
