// The common work of npm's etcd3 (gRPC). Arguments: endpoint, beginning of values, folder for files.
// Each line of the output is a JSON list: what was done, and what came back, without what differs from run to run.
'use strict';

const fs = require('fs');
const { Etcd3 } = require('etcd3');

const [endpoint, secret] = process.argv.slice(2);
const read = name => process.env[name] && fs.readFileSync(process.env[name]);

function connect(more) {
  const options = { hosts: endpoint, ...more };
  if (process.env.ETCD_CA) {
    options.credentials = { rootCertificate: read('ETCD_CA'), certChain: read('ETCD_CERT'), privateKey: read('ETCD_KEY') };
  }
  return new Etcd3(options);
}

const c = connect();
const v = n => `${secret}-${n}`;

function plain(x, name) {
  if (name === 'lease') return x !== '0';
  if (Buffer.isBuffer(x)) return x.toString('latin1');
  if (Array.isArray(x)) return x.map(y => plain(y));
  if (x instanceof Map) return plain([...x]);
  if (x && typeof x === 'object') return Object.fromEntries(Object.entries(x).map(([k, y]) => [k, plain(y, k)]));
  return x === undefined ? null : x;
}

const say = (what, got) => console.log(JSON.stringify([what, plain(got)]));

async function refused(what, work) {
  try {
    say(what, await work());
  } catch (e) {
    say(what, ['refused', e.constructor.name, e.message]);
  }
}

const once = (emitter, event) => new Promise((resolve, reject) => {
  emitter.once(event, (...args) => resolve(args));
  if (event !== 'error') emitter.once('error', reject);
});

async function values() {
  say('put', await c.put('a').value(v(1)));
  say('put with what was', await c.put('a').value(v(2)).getPrevious());
  say('get', await c.get('a'));
  say('get all of it', await c.get('a').exec());
  say('get nothing', await c.get('nothing'));
  say('exists', [await c.get('a').exists(), await c.get('nothing').exists()]);
  say('touch', await c.put('a').touch());
  await refused('touch nothing', () => c.put('nothing').touch());
  say('touched', await c.get('a').exec());
  await c.put('number').value(42);
  say('number', await c.get('number').number());
  await c.put('json').value(JSON.stringify({ password: v('json') }));
  say('JSON', await c.get('json').json());
  await c.put('empty').value('');
  say('empty', await c.get('empty').exec());
  await c.put('bytes').value(Buffer.concat([Buffer.from(v(0)), Buffer.from(Array.from({ length: 256 }, (_, i) => i))]));
  say('bytes', await c.get('bytes').buffer());
  say('as of before', await c.get('a').revision(2));
  for (const [i, n] of [...'30124'].entries()) await c.put(`dir/${i}`).value(v(n));
  const dir = () => c.getAll().prefix('dir/');
  say('prefix', await dir().strings());
  for (const target of ['Key', 'Version', 'Create', 'Mod', 'Value']) {
    for (const order of ['None', 'Ascend', 'Descend']) say(`by ${target} ${order}`, await dir().sort(target, order).exec());
  }
  say('first by value', await dir().sort('Value', 'Descend').limit(2).exec());
  say('keys by value', await dir().sort('Value', 'Ascend').keys());
  say('count', await dir().count());
  say('in a range', await c.getAll().inRange({ start: 'dir/1', end: 'dir/3' }));
  say('serializable', await c.getAll().serializable(true).keys());
  say('by revisions', await dir().minModRevision(10).maxCreateRevision(13).exec());
}

async function namespaces() {
  const inside = c.namespace('inside/');
  await inside.put('a').value(v('in'));
  await inside.namespace('deeper/').put('a').value(v('deeper'));
  say('inside', await inside.getAll().strings());
  say('inside is', [await inside.get('a'), await c.get('inside/a'), await c.get('a')]);
  say('if inside', await inside.if('a', 'Value', '==', v('in')).then(inside.put('b').value(v('b'))).commit());
  const watcher = await inside.watch().prefix('').create();
  const seen = once(watcher, 'put');
  await inside.put('watched').value(v('watched'));
  say('watched inside', await seen);
  await watcher.cancel();
  say('delete inside', await inside.delete().all());
}

async function compares() {
  for (const operand of [v(1), v(2), v(3), '']) {
    for (const result of ['==', '!=', '<', '>']) {
      say(`${result} ${operand.slice(-1)}`, await c.if('a', 'Value', result, operand).and('a', 'Version', '>', 0)
        .then(c.put('then').value(v(5)), c.get('a')).else(c.delete().key('then'), c.getAll().prefix('dir/')).commit());
    }
  }
  say('if nothing', await c.if('nothing', 'Value', '!=', v(1)).then(c.put('never').value(v(5))).else(c.get('a')).commit());
  say('if of others', await c.if('a', 'Create', '==', 2).and('a', 'Mod', '>', 1).and('a', 'Lease', '==', 0).then(c.put('then').value(v(6))).commit());
  say('compare and swap', await Promise.all(Array.from({ length: 4 }, (_, i) => c.if('a', 'Value', '==', v(2))
    .then(c.put('a').value(v('swapped'))).commit().then(r => r.succeeded))).then(all => all.filter(x => x).length));
}

async function leases() {
  const lease = c.lease(600);
  say('put with a lease', await lease.put('leased').value(v(1)).exec());
  say('keep alive', (await lease.keepaliveOnce()).TTL);
  say('keys of the lease', (await c.leaseClient.leaseTimeToLive({ ID: await lease.grant(), keys: true })).keys);
  say('put ignoring the lease', await c.put('leased').value(v(2)).ignoreLease());
  say('leased', await c.get('leased').exec());
  const deleted = await c.watch().key('leased').withPreviousKV().create();
  const seen = once(deleted, 'delete');
  await lease.revoke();
  say('gone', await seen);
  await deleted.cancel();
  const lost = c.lease(600, { autoKeepAlive: false });
  await c.leaseClient.leaseRevoke({ ID: await lost.grant() });
  await refused('a lease that is gone', () => lost.keepaliveOnce().catch(e => { e.message = e.message.replace(/\d+/, 'N'); throw e; }));
  await refused('put with it', () => c.put('leased').value(v(3)).lease(lost.grant()));
}

async function watches() {
  const watcher = await c.watch().prefix('watch/').withPreviousKV().create();
  const events = [];
  const done = new Promise(resolve => watcher.on('data', r => {
    events.push(...r.events);
    if (events.length >= 5) resolve();
  }));
  for (const n of [1, 2, 3]) await c.put(`watch/${n % 2}`).value(v(n));
  await c.delete().prefix('watch/');
  await done;
  for (const e of events) say('watched', e);
  await watcher.cancel();
  const first = events[0].kv.mod_revision;
  const history = c.watch().prefix('watch/').only('put').startRevision(first).watcher();
  const seen = [];
  await new Promise(resolve => history.on('put', kv => seen.push(kv) === 3 && resolve()));
  say('watched from before', seen);
  await history.cancel();
  say('delete with what was', [await c.delete().key('then').getPrevious(), await c.delete().key('then').getPrevious()]);
}

async function locks() {
  const lock = c.lock('lock').ttl(600);
  await lock.acquire();
  await refused('lock what is held', () => c.lock('lock').acquire());
  say('held', await c.get('lock').exec());
  await lock.release();
  say('released', await c.get('lock').exists());
  say('do', await c.lock('lock').do(async () => (await c.get('lock').exec()).count));
}

async function elections() {
  const election = c.election('election', 600);
  const one = election.campaign(v('one'));
  await one.wait();
  const observer = await election.observe();
  say('leader', [observer.leader(), await election.leader()]);
  let seen = once(observer, 'change');
  await one.proclaim(v('one tells'));
  say('proclaimed', await seen);
  const two = election.campaign(v('two'));
  const elected = two.wait();
  await once(two, '_isWaiting');
  seen = once(observer, 'change');
  await one.resign();
  await elected;
  say('the next', [await seen, await election.leader()]);
  await refused('proclaim after that', () => one.proclaim(v('too late')));
  await two.resign();
  await observer.cancel();
}

async function transactions() {
  for (const isolation of [0, 1, 2]) { // SerializableSnapshot, Serializable, RepeatableReads: a const enum, which is TypeScript's alone
    // At one revision, as the library's snapshots want it of all that they write.
    await c.if('stm/a', 'Version', '>', -1).then(c.put('stm/a').value(100), c.put('stm/b').value(100)).commit();
    await Promise.all(Array.from({ length: 3 }, async (_, i) => {
      const [from, to] = i % 2 ? ['stm/a', 'stm/b'] : ['stm/b', 'stm/a'];
      for (let n = 0; n < 3; n++) {
        await c.stm({ isolation, retries: 1000 }).transact(async tx => {
          const [a, b] = [await tx.get(from).number(), await tx.get(to).number()];
          await tx.put(from).value(a - 1);
          await tx.put(to).value(b + 1);
        });
      }
    }));
    say(`isolation ${isolation}`, await c.getAll().prefix('stm/').strings()); // one goes one way, two the other
  }
}

async function server() {
  const status = await c.maintenance.status();
  say('status', [status.version.split('.').slice(0, 2), status.leader, status.raftTerm]);
  await refused('a member that is none', () => c.cluster.memberRemove({ ID: 1 }));
  say('alarms', (await c.maintenance.alarm({ action: 'GET' })).alarms);
  say('no space', (await c.maintenance.alarm({ action: 'ACTIVATE', memberID: 0, alarm: 'NOSPACE' })).alarms);
  await refused('put without space', () => c.put('full').value(v(1)));
  await refused('swap without space', () => c.if('a', 'Value', '==', v(2)).then(c.put('a').value(v(1))).commit());
  say('space', (await c.maintenance.alarm({ action: 'DEACTIVATE', memberID: 0, alarm: 'NOSPACE' })).alarms);
  await c.put('compacted').value(v(1));
  const { header } = await c.put('compacted').value(v(2));
  await c.kv.compact({ revision: header.revision, physical: true });
  await refused('what was compacted', () => c.get('compacted').revision(3));
  await refused('the future', () => c.get('compacted').revision(99999));
  await refused('too large', () => c.put('large').value(v('x'.repeat(1600 << 10))));
  await refused('no key', () => c.put('').value(v(1)));
  await refused('twice in one transaction', () => c.if('a', 'Version', '>', 0).then(c.put('a').value(v(1)), c.put('a').value(v(1))).commit());
}

async function users() {
  const role = await c.role('readers').create();
  await role.grant([{ permission: 'Read', range: c.range({ prefix: 'dir/' }) }, { permission: 'Readwrite', key: 'mine' }]);
  say('permissions', await role.permissions());
  const reader = await c.user('reader').create('reader-password');
  await reader.addRole('readers');
  await refused('once more', () => c.user('reader').create('reader-password'));
  await refused('a role that is none', () => reader.addRole('nobodies'));
  say('roles of the user', (await reader.roles()).map(r => r.name));
  await c.role('root').create();
  await (await c.user('root').create('root-password')).addRole('root');
  say('users', (await c.getUsers()).map(u => u.name));
  say('roles', (await c.getRoles()).map(r => r.name));
  await c.auth.authEnable();
  await refused('without a name', () => c.get('a'));
  const wrong = connect({ auth: { username: 'reader', password: 'wrong' } });
  await refused('a wrong password', () => wrong.get('dir/1'));
  wrong.close();
  for (const username of ['reader', 'root']) {
    const u = connect({ auth: { username, password: `${username}-password` } });
    await refused(`${username} gets`, () => u.get('dir/1'));
    await refused(`${username} gets another's`, () => u.get('a'));
    await refused(`${username} puts`, () => u.put('mine').value(v(1)));
    await refused(`${username} puts another's`, () => u.put('dir/1').value(v(1)));
    await refused(`${username} swaps`, () => u.if('mine', 'Value', '==', v(1)).then(u.put('mine').value(v(2))).commit());
    await refused(`${username} compares another's`, () => u.if('a', 'Value', '==', v(2)).then(u.get('mine')).commit());
    await refused(`${username} writes another's`, () => u.if('mine', 'Value', '==', v(2)).then(u.put('a').value(v(9))).commit());
    if (username === 'root') {
      await u.role('readers').revoke({ permission: 'Readwrite', key: 'mine' });
      say('permissions left', await u.role('readers').permissions());
      await u.auth.authDisable();
    }
    u.close();
  }
  await reader.removeRole('readers');
  await reader.delete();
  await role.delete();
  say('users left', (await c.getUsers()).map(u => u.name));
}

(async () => {
  for (const work of [values, namespaces, compares, leases, watches, locks, elections, transactions, server, users]) await work();
  c.close();
  // The library sets a timer again by the answer to a lease that it has let go of meanwhile, and would wait for it.
  process.stdout.write('', () => process.exit(0));
})().catch(e => {
  console.error(e);
  process.exit(1);
});
