package linear

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
)

// etcd promises for a lock that a client that is told that it has the lock had the oldest of all
// keys at some moment of its call, and has the lock for as long as that key exists. The key
// disappears with its lease, at any time, and nobody is told. So only an operation on condition
// that the key exists (the fence) is exclusive. The revision of its creation (the token)
// distinguishes holders, and later holders have a higher one.
type (
	enter  struct{ token int64 } // the lock was acquired
	leave  struct{ token int64 } // the key was deleted, or its lease revoked
	barred struct{ token int64 } // the fence failed
	look   struct {              // with the fence
		token int64
		value string
	}
	change struct { // with the fence and a compare of values, which succeeded
		token      int64
		old, value string
	}
	differ struct { // the fence succeeded, and the compare of values failed
		token      int64
		old, value string
	}
)

// guarded is a lock, and a register that the holder of the lock writes.
type guarded struct {
	token int64 // of the newest holder
	gone  bool  // that is known to hold it no more
	value string
}

func locking(state, in any) (bool, any) {
	s := state.(guarded)
	holds := func(token int64) bool { return token == s.token && !s.gone }
	switch i := in.(type) {
	case put: // the first value
		s.value = i.value
		return true, s
	case enter:
		ok := i.token > s.token
		s.token, s.gone = i.token, false
		return ok, s
	case leave:
		s.gone = s.gone || i.token == s.token
		return i.token <= s.token, s
	case barred:
		s.gone = s.gone || i.token == s.token
		return i.token <= s.token, s
	case look:
		return holds(i.token) && i.value == s.value, s
	case differ:
		return holds(i.token) && i.value == s.value && i.old != s.value, s
	case change:
		ok := holds(i.token) && i.old == s.value
		s.value = i.value
		return ok, s
	}
	return false, s
}

// TestLocks has clients take turns with etcd's Lock service and its library's mutexes, of the same
// name. Some bypass the proxies, if the rule permits it.
func TestLocks(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.rounds(t, func(t *testing.T, round string) {
		h := newHistory()
		var work []func(context.Context)
		var all []*locker
		for prefix, clients := range map[string][]struct {
			via     int
			service bool
		}{
			// every key encrypted: all use a proxy, which runs the service
			"/s/": {{0, true}, {1, true}, {0, false}, {1, false}},
			// encrypted by clients of a proxy, and not by those that bypass it
			"/m/": {{0, true}, {1, false}, {direct, true}, {direct, false}},
			// without a rule: the service is etcd's
			"/u/": {{0, true}, {1, false}, {direct, true}},
		} {
			name := prefix + "lock-" + round
			register := "/s/behind" + name
			s.first(t, h, register, s.Sealed.Value("first"))
			for _, c := range clients {
				l := &locker{holder: s.holder(t, h, len(work), c.via), name: name, register: register, service: c.service}
				all, work = append(all, l), append(work, l.turn)
			}
		}
		s.round(t, h, work, func() error {
			for _, l := range all {
				if l.turns.Load() < 3 {
					return fmt.Errorf("a client of %s had the lock %d times", l.name, l.turns.Load())
				}
			}
			return nil
		})
		for _, l := range all {
			t.Logf("%s, service %t, round the proxies %t: %d turns, %d times barred", l.name, l.service, l.around, l.turns.Load(), l.refusals.Load())
			l.judge(t)
		}
		h.check(t, locking, guarded{})
	})
}

type locker struct {
	*holder
	name, register string
	service        bool // otherwise the library
}

// turn acquires and releases the lock once.
func (l *locker) turn(ctx context.Context) {
	lease, session, end := l.session(ctx)
	if session == nil {
		return
	}
	defer end()
	key, unlock, err := l.lock(ctx, lease, session)
	if err != nil {
		return
	}
	token := l.token
	// The fence stops a holder that ignores the lease, once etcd has ended it.
	switch old, err := l.look(ctx, key, token); {
	case err != nil || old == "":
		return
	case !l.change(ctx, key, token, old, 2):
		return
	}
	l.turns.Add(1)
	call := l.now()
	switch rand.IntN(16) {
	case 0: // the lease ends, as if it was not kept alive, and its holder does not know
		if l.revoke(ctx, lease) != nil {
			return
		}
		l.revoked = true
		l.add(record{client: l.id, key: l.register, call: call, in: leave{token}})
	case 1: // while its holder works
		l.revoked = true
		var revoked sync.WaitGroup
		defer revoked.Wait()
		revoked.Go(func() {
			sleep(ctx, between(0, 20))
			_ = l.revoke(ctx, lease) // done at the end, if not here
		})
		if old, err := l.look(ctx, key, token); err == nil && old != "" {
			l.change(ctx, key, token, old, 20)
		}
		return
	case 2: // it is not kept alive
		session.Orphan()
		sleep(ctx, between(1000, 4000))
	default:
		bounded, cancel := answer(ctx)
		defer cancel()
		if unlock(bounded) != nil {
			return
		}
		l.revoked = true
		l.add(record{client: l.id, key: l.register, call: call, in: leave{token}})
	}
	if old, err := l.look(ctx, key, token); err == nil && old != "" {
		l.change(ctx, key, token, old, 1)
	}
}

// lock waits for the lock, and returns its key, and a function that releases it.
func (l *locker) lock(ctx context.Context, lease clientv3.LeaseID, session *concurrency.Session) (key string, unlock func(context.Context) error, err error) {
	waiting, cancel := context.WithTimeout(ctx, 2*patient)
	defer cancel()
	call := l.now()
	if l.service {
		var r *v3lockpb.LockResponse
		r, err = l.locks.Lock(waiting, &v3lockpb.LockRequest{Name: []byte(l.name), Lease: int64(lease)})
		key = string(r.GetKey())
		unlock = func(ctx context.Context) error {
			_, err := l.locks.Unlock(ctx, &v3lockpb.UnlockRequest{Key: r.GetKey()})
			return err
		}
	} else {
		m := concurrency.NewMutex(session, l.name)
		err = m.Lock(waiting)
		key, unlock = m.Key(), m.Unlock
	}
	ret := l.now()
	if err != nil {
		return "", nil, err
	}
	l.answered(l.id, 1)
	asking, stop := answer(ctx)
	defer stop()
	r, err := l.kv.Range(asking, &pb.RangeRequest{Key: []byte(key), KeysOnly: true})
	if err != nil || len(r.Kvs) == 0 {
		return "", nil, errGone
	}
	// No key of the lease can be older: this was the first request for it.
	l.token = r.Kvs[0].CreateRevision
	l.add(record{client: l.id, key: l.register, call: call, ret: ret, in: enter{l.token}})
	return key, unlock, nil
}

// fenced does something on condition that a key is the one that was acquired. It returns no
// response if it is not.
func (l *locker) fenced(ctx context.Context, r record, key string, token int64, compare []*pb.Compare, op, other *pb.RequestOp) (*pb.TxnResponse, error) {
	ctx, cancel := answer(ctx)
	defer cancel()
	fence := &pb.Compare{Key: []byte(key), Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{CreateRevision: token}}
	got, err := l.kv.Txn(ctx, &pb.TxnRequest{
		Compare: append([]*pb.Compare{fence}, compare...),
		Success: []*pb.RequestOp{op},
		Failure: []*pb.RequestOp{read(key), read(l.leaseKey), other},
	})
	if err != nil {
		r.unknown = true
		l.add(r)
		return nil, err
	}
	l.answered(l.id, 1)
	if got.Succeeded {
		return got, nil
	}
	if kvs := got.Responses[0].GetResponseRange().Kvs; len(kvs) == 1 && kvs[0].CreateRevision == token {
		return got, nil
	}
	l.refusals.Add(1)
	r.in, r.wrote, r.saw = barred{token}, "", ""
	l.add(r)
	if kvs := got.Responses[1].GetResponseRange().Kvs; len(kvs) > 0 && !l.revoked {
		l.wrong("the key of a lock is gone, and other keys of its lease are there")
	}
	return nil, errGone
}

// look returns the value of the register.
func (l *locker) look(ctx context.Context, key string, token int64) (string, error) {
	r := record{client: l.id, key: l.register, call: l.now()}
	got, err := l.fenced(ctx, r, key, token, nil, read(l.register), read(l.register))
	if err != nil || !got.Succeeded {
		return "", err
	}
	r.saw = string(got.Responses[0].GetResponseRange().Kvs[0].Value)
	r.in = look{token, r.saw}
	l.add(r)
	return r.saw, nil
}

// change writes the register so many times, and reports whether it succeeded.
func (l *locker) change(ctx context.Context, key string, token int64, old string, times int) bool {
	for range times {
		l.n++
		value := l.Sealed.Value(fmt.Sprintf("%d-%d", l.id, l.n))
		r := record{client: l.id, key: l.register, call: l.now(), in: change{token, old, value}, wrote: value, saw: old}
		got, err := l.fenced(ctx, r, key, token,
			[]*pb.Compare{{Key: []byte(l.register), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte(old)}}},
			&pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(l.register), Value: []byte(value)}}}, read(l.register))
		if err != nil {
			return false
		}
		if !got.Succeeded {
			r.saw = string(got.Responses[2].GetResponseRange().Kvs[0].Value)
			r.in, r.wrote = differ{token, old, r.saw}, ""
		}
		l.add(r)
		if !got.Succeeded {
			return false
		}
		old = value
		// some work, so that others can act in between
		time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
	}
	return true
}

func read(key string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}
}
