// Package linear checks with porcupine that the results that clients of two proxies got, with every
// key encrypted, are linearizable: registers, counters, locks and elections, while proxies and
// members of etcd are killed and paused, the leader moves, and the networks between them fail.
//
// LINEAR_ROUNDS is the number of rounds; each takes ten seconds.
package linear

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// The operations on a register, with their results.
type (
	get  struct{ value string }
	put  struct{ value string }
	swap struct{ old, value string } // by a compare of values, which succeeded
	kept struct{ old, value string } // the compare failed: the value is another one
)

// register is one key of etcd.
func register(state, in any) (bool, any) {
	switch i := in.(type) {
	case get:
		return i.value == state, state
	case put:
		return true, i.value
	case swap:
		return i.old == state, i.value
	case kept:
		return i.value == state && i.old != state, state
	}
	return false, state
}

// TestLinearizable has clients share registers, and counters that they increment by compares of
// values.
func TestLinearizable(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.rounds(t, func(t *testing.T, round string) {
		h := newHistory()
		prefix := "/s/" + round + "/"
		var work []func(context.Context)
		for id := range 6 {
			c := &client{site: s, history: h, id: id, prefix: prefix, known: make(map[string]string)}
			c.kv = pb.NewKVClient(harness.Dial(t, s.reach(id%2), nil))
			work = append(work, c.share)
		}
		counters := make(map[string]*tally)
		for n := range 2 {
			key := fmt.Sprintf("%scounter-%d", prefix, n)
			counters[key] = new(tally)
			s.first(t, h, key, s.Sealed.Value("0"))
		}
		for id := len(work); id < 10; id++ {
			c := &client{site: s, history: h, id: id}
			c.kv = pb.NewKVClient(harness.Dial(t, s.reach(id%2), nil))
			key := fmt.Sprintf("%scounter-%d", prefix, id/2%2)
			work = append(work, func(ctx context.Context) { c.count(ctx, key, counters[key]) })
		}
		s.round(t, h, work, func() error {
			swaps := 0
			h.mu.Lock()
			defer h.mu.Unlock()
			for _, r := range h.records {
				if _, ok := r.in.(swap); ok && !r.unknown {
					swaps++
				}
			}
			if swaps < 50 || len(h.records) < 500 {
				return fmt.Errorf("%d operations and %d swaps prove little", len(h.records), swaps)
			}
			return nil
		})
		last := &client{site: s, history: h, id: len(work), kv: pb.NewKVClient(harness.Dial(t, s.proxies[rand.IntN(2)].Address, nil))}
		for key, done := range counters {
			var value string
			harness.Eventually(t, within, "a counter's last value", func() (err error) {
				value, err = last.get(t.Context(), key)
				return err
			})
			if n := s.number(value); n < done.known || n > done.known+done.unknown {
				t.Errorf("a counter that was incremented %d times, and %d times without an answer, stands at %d", done.known, done.unknown, n)
			}
			t.Logf("%s: %d increments, %d without an answer", key, done.known, done.unknown)
		}
		h.check(t, register, "")
	})
}

// tally counts the increments of one counter. It is guarded by history.mu.
type tally struct{ known, unknown int }

type client struct {
	*site
	*history
	kv     pb.KVClient
	id, n  int
	prefix string
	known  map[string]string
}

// fresh returns a value that no other client writes.
func (c *client) fresh() string {
	c.n++
	return c.Sealed.Value(fmt.Sprintf("%d-%d", c.id, c.n))
}

// share does one operation on one of three registers.
func (c *client) share(ctx context.Context) {
	key := fmt.Sprintf("%sregister-%d", c.prefix, rand.IntN(3))
	old, value := c.known[key], c.fresh()
	delete(c.known, key)
	var err error
	switch kind := rand.IntN(3); {
	case kind == 0:
		err = c.put(ctx, key, value)
	case kind == 1 && old != "": // a compare with an absent key fails
		_, value, err = c.swap(ctx, key, old, value)
	default:
		value, err = c.get(ctx, key)
	}
	if err == nil {
		c.known[key] = value
	}
}

// number returns the number in a counter's value; the rest of the value shows who wrote it.
func (s *site) number(value string) int {
	n, _, _ := strings.Cut(strings.TrimPrefix(value, s.Sealed.Value("")), " ")
	i, err := strconv.Atoi(n)
	if err != nil {
		return -1
	}
	return i
}

// count increments a counter once: it reads it, and writes the next value if it is unchanged.
func (c *client) count(ctx context.Context, key string, done *tally) {
	old, err := c.get(ctx, key)
	for swapped := false; err == nil && !swapped; {
		c.n++
		next := c.Sealed.Value(fmt.Sprintf("%d by %d-%d", c.number(old)+1, c.id, c.n))
		swapped, old, err = c.swap(ctx, key, old, next)
		c.mu.Lock()
		if err != nil {
			done.unknown++
		} else if swapped {
			done.known++
		}
		c.mu.Unlock()
	}
}

func (c *client) get(ctx context.Context, key string) (string, error) {
	ctx, cancel := answer(ctx)
	defer cancel()
	r := record{client: c.id, key: key, call: c.now()}
	got, err := c.kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		return "", err
	}
	if len(got.Kvs) > 0 {
		r.saw = string(got.Kvs[0].Value)
	}
	r.in = get{r.saw}
	c.add(r)
	c.answered(c.id, 1)
	return r.saw, nil
}

func (c *client) put(ctx context.Context, key, value string) error {
	ctx, cancel := answer(ctx)
	defer cancel()
	r := record{client: c.id, key: key, call: c.now(), in: put{value}, wrote: value}
	_, err := c.kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
	r.unknown = err != nil
	c.add(r)
	if err == nil {
		c.answered(c.id, 1)
	}
	return err
}

// swap reports whether the value was old and is the new one now, and what it is.
func (c *client) swap(ctx context.Context, key, old, value string) (swapped bool, now string, err error) {
	ctx, cancel := answer(ctx)
	defer cancel()
	k := []byte(key)
	r := record{client: c.id, key: key, call: c.now(), in: swap{old, value}, wrote: value, saw: old}
	got, err := c.kv.Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: k, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte(old)}}},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: k, Value: []byte(value)}}}},
		Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: k}}}},
	})
	r.unknown, now = err != nil, value
	if err == nil && !got.Succeeded {
		now = ""
		if kvs := got.Responses[0].GetResponseRange().Kvs; len(kvs) > 0 {
			now = string(bytes.Clone(kvs[0].Value))
		}
		r.in, r.wrote, r.saw = kept{old, now}, "", now
	}
	c.add(r)
	if err == nil {
		c.answered(c.id, 1)
	}
	return r.wrote != "", now, err
}

// answer limits the wait for one response. The end of a round does not end it: otherwise the result
// of all calls in flight would be unknown.
func answer(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), patient)
}
