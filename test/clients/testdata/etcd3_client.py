"""The common work of python3-etcd3 (gRPC). Arguments: endpoint, beginning of values, folder for files.

Each line of the output is a JSON list: what was done, and what came back, without what differs from run to run.
"""
import json
import os
import queue
import sys
from urllib.parse import urlsplit

import etcd3
import etcd3.etcdrpc as rpc
import grpc
from etcd3.client import KVMetadata

endpoint, secret, folder = sys.argv[1:]
url = urlsplit(endpoint)


def client(**more):
    return etcd3.client(host=url.hostname, port=url.port, timeout=20, ca_cert=os.environ.get("ETCD_CA"),
                        cert_cert=os.environ.get("ETCD_CERT"), cert_key=os.environ.get("ETCD_KEY"), **more)


c = client()
t = c.transactions


def v(n):
    return f"{secret}-{n}"


def plain(x):
    if isinstance(x, bytes):
        return x.decode("latin-1")
    if isinstance(x, KVMetadata):
        return [plain(x.key), x.create_revision, x.mod_revision, x.version, x.lease_id != 0, x.response_header.revision]
    if isinstance(x, etcd3.events.Event):
        return [type(x).__name__, plain(x.key), plain(x.value), x.mod_revision, x.version, plain(x.prev_value), x.prev_mod_revision]
    if hasattr(x, "DESCRIPTOR"):
        return {f.name: plain(y) for f, y in x.ListFields()}
    if isinstance(x, (str, int, float, type(None))):
        return x
    return [plain(y) for y in x]


def say(what, got):
    print(json.dumps([what, plain(got)], sort_keys=True), flush=True)


def refused(what, f, *args, **kwargs):
    try:
        say(what, f(*args, **kwargs))
    except grpc.RpcError as e:
        say(what, ["refused", e.code().name, e.details(), sorted(k for k, _ in e.trailing_metadata())])
    except etcd3.exceptions.Etcd3Exception as e:
        say(what, ["refused", type(e).__name__, str(e), getattr(e, "compacted_revision", None)])


# Keys and values.
say("put", c.put("a", v(1)))
say("put with what was", c.put("a", v(2), prev_kv=True))
say("get", c.get("a"))
say("get serializable", c.get("a", serializable=True))
say("get nothing", c.get("nothing"))
say("put empty", c.put("empty", ""))
say("get empty", c.get("empty"))
say("put bytes", c.put(b"\xff\x00", v(0).encode() + bytes(range(256))))
say("get bytes", c.get(b"\xff\x00"))
for i, n in enumerate("30124"):
    c.put(f"dir/{i}", v(n))
for target in "key", "version", "create", "mod", "value":
    for order in None, "ascend", "descend":
        say(f"prefix by {target} {order}", c.get_prefix("dir/", sort_target=target, sort_order=order))
say("keys by value", c.get_prefix("dir/", keys_only=True, sort_target="value", sort_order="descend"))
say("range", c.get_range("dir/1", "dir/3"))
say("all", c.get_all(sort_target="value", sort_order="ascend"))
say("put if there is none", [c.put_if_not_exists("created", v(1)), c.put_if_not_exists("created", v(2))])

# Compares by VALUE.
say("replace", c.replace("a", v(2), v(3)))
say("replace what it is not", c.replace("a", v(2), v(4)))
say("replace nothing", c.replace("nothing", v(2), v(4)))
say("replaced", c.get("a"))
for operand in v(2), v(3), v(4), "":
    for name, compare in ("==", t.value("a") == operand), ("!=", t.value("a") != operand), ("<", t.value("a") < operand), (">", t.value("a") > operand):
        say(f"{name} {operand[-1:]}", c.transaction(
            compare=[compare, t.version("a") > 0],
            success=[t.put("then", v(5), prev_kv=True), t.get("a")],
            failure=[t.delete("then", prev_kv=True), t.get("dir/", "dir0")]))
say("a range of values, and a transaction in a transaction", c.transaction(
    compare=[t.value("dir/", "dir0") > v(0)],
    success=[],
    failure=[t.txn(compare=[t.value("dir/0") == v(3)], success=[t.put("nested", v(6))], failure=[]), t.get("a")]))
say("nested", c.get("nested"))

# Leases.
lease = c.lease(600)
say("put with a lease", c.put("leased", v(1), lease=lease))
say("lease", [lease.ttl, 590 < lease.remaining_ttl <= 600, lease.granted_ttl, lease.keys])
say("refresh", [r.TTL for r in lease.refresh()])
lease.revoke()
say("gone", c.get("leased"))
say("refresh what is gone", [r.TTL for r in lease.refresh()])
refused("revoke what is gone", lease.revoke)
refused("put with a lease that is gone", c.put, "leased", v(1), lease=lease)
refused("a lease of one's own number", lambda: c.lease(600, 77).id)
refused("once more", lambda: c.lease(600, 77).id)

# Locks: released by a compare of the VALUE. To wait for one fails in the library itself: its tenacity is older than Debian's.
one, two = c.lock("lock", ttl=600), c.lock("lock", ttl=600)
say("acquire", one.acquire())
say("held", [one.is_acquired(), two.is_acquired()])
say("acquire what is held", two.acquire(timeout=0))
say("refresh the lock", [r.TTL for r in one.refresh()])
say("release what another holds", two.release())
say("release", one.release())
say("acquire what is free", [two.acquire(), one.is_acquired(), two.is_acquired()])
say("release by the other", two.release())
with c.lock("lock", ttl=600) as held:
    say("within", held.is_acquired())

# An election: who puts the key leads, tells by a compare of the VALUE, and is followed by a watch.
seen, stop_watching = c.watch("leader")
terms = [c.lease(600), c.lease(600)]
say("one leads", c.put_if_not_exists("leader", v("one"), lease=terms[0]))
say("two does not", c.put_if_not_exists("leader", v("two"), lease=terms[1]))
say("two cannot tell", c.replace("leader", v("two"), v("two tells")))
say("one tells", c.transaction(
    compare=[t.value("leader") == v("one")], success=[t.put("leader", v("one tells"), lease=terms[0])], failure=[])[0])
terms[0].revoke()
say("two follows", c.put_if_not_exists("leader", v("two"), lease=terms[1]))
for _ in range(4):
    say("the leader", next(seen))
stop_watching()

# Watches.
events = queue.Queue()
number = c.add_watch_prefix_callback("watch/", events.put, prev_kv=True)
for n in 1, 2, 3:
    c.put(f"watch/{n % 2}", v(n))
c.delete_prefix("watch/")
left = 5
while left > 0:
    r = events.get(timeout=20)
    left -= len(r.events)
    for e in r.events:
        say("watched", e)
c.cancel_watch(number)
revision = c.get("a")[1].response_header.revision
c.put("watch/1", v(4))
say("watch once from before", c.watch_once("watch/1", timeout=20, start_revision=revision + 1))
try:
    c.watch_once("watch/1", timeout=0.2)
except etcd3.exceptions.WatchTimedOut:
    say("watch nothing", "timed out")

# Deletes.
say("delete", [c.delete("watch/1"), c.delete("watch/1")])
say("delete with what was", c.delete("then", prev_kv=True, return_response=True))
say("delete a prefix", c.delete_prefix("dir/"))

# The server.
status = c.status()
say("status", [status.version.split(".")[:2], status.leader.id, status.raft_term, status.db_size > 0])
say("members", [m.id for m in c.members])
refused("a member that is none", c.remove_member, 1)
say("an alarm", [a.alarm_type for a in c.create_alarm()])
say("alarms", [a.alarm_type for a in c.list_alarms()])
refused("put without space", c.put, "full", v(1))
refused("replace without space", c.replace, "a", v(3), v(1))
say("disarm", [a.alarm_type for a in c.disarm_alarm()])
say("no alarms", [a.alarm_type for a in c.list_alarms()])
say("space again", c.put("full", v(2)))
refused("compact", c.compact, revision, physical=True)
refused("compact again", c.compact, revision)
refused("watch what was compacted", lambda: next(c.watch("a", start_revision=1)[0]))
refused("compact the future", c.compact, 99999)
c.defragment()
say("hash", c.hash() > 0)
with open(os.path.join(folder, "snapshot.db"), "wb") as f:
    c.snapshot(f)
refused("put no key", c.put, "", v(1))
refused("too large", c.put, "large", v(1) + "x" * (1600 << 10))
refused("twice in one transaction", c.transaction, compare=[], success=[t.put("a", v(1))] * 2, failure=[])

# Users. The library makes them by no call of its own, but comes in with their names; with Debian's grpcio over TLS alone.
if url.scheme != "https":
    sys.exit()
auth = rpc.AuthStub(c.channel)
for name, role in ("root", "root"), ("reader", "readers"):
    auth.UserAdd(rpc.AuthUserAddRequest(name=name, password=name + "-password"))
    auth.RoleAdd(rpc.AuthRoleAddRequest(name=role))
    auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=name, role=role))
auth.RoleGrantPermission(rpc.AuthRoleGrantPermissionRequest(
    name="readers", perm={"permType": "READ", "key": b"a", "range_end": b"b"}))
auth.AuthEnable(rpc.AuthEnableRequest())
refused("without a name", c.get, "a")
refused("a wrong password", client, user="reader", password="wrong")
root, reader = [client(user=name, password=name + "-password") for name in ("root", "reader")]
for name, user in ("root", root), ("reader", reader):
    refused(f"{name} gets", user.get, "a")
    refused(f"{name} gets another's", user.get, "full")
    refused(f"{name} replaces", user.replace, "a", v(3), v(7))
    refused(f"{name} compares another's", user.transaction, compare=[t.value("full") == v(2)], success=[t.get("a")], failure=[])
    refused(f"{name} watches", user.watch_once, "a", timeout=20, start_revision=revision)
    refused(f"{name} takes a lock", lambda: user.lock("users", ttl=600).acquire())
rpc.AuthStub(root.channel).AuthDisable(rpc.AuthDisableRequest(), metadata=root.metadata)
