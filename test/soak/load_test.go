package soak

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// work writes and reads until ctx ends.
func (l *load) work(ctx context.Context, t *testing.T, worker int) {
	kv := pb.NewKVClient(l.conn)
	for n := 0; ctx.Err() == nil; n++ {
		key := fmt.Sprintf("%sns-%d/key-%d", sealed, worker, n%keysEach)
		l.put(t, kv, key, l.env.Sealed.Value(fmt.Sprintf("%d-%d", worker, n)))
		l.get(t, kv, key)
		// Keys without a rule work as if there were no KMS.
		key, value := fmt.Sprintf("%sns-%d", clear, worker), l.env.Clear.Value(fmt.Sprint(n))
		own, cancel := limited()
		if _, err := kv.Put(own, &pb.PutRequest{Key: []byte(key), Value: []byte(value)}); err != nil {
			t.Errorf("put of a key under no rule: %v", err)
		}
		res, err := kv.Range(own, &pb.RangeRequest{Key: []byte(key)})
		if err != nil || len(res.Kvs) != 1 || string(res.Kvs[0].Value) != value {
			t.Errorf("get of a key under no rule: %v, %v", res, err)
		}
		cancel()
		if n%50 == 0 {
			l.list(t, kv, worker)
		}
		// The load should last, and not use the whole machine.
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// limited bounds one call: nothing may hang longer than a KMS call with its retries.
func limited() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 20*time.Second)
}

// excused reports whether an error is permitted because the KMS has trouble; every other is a fault
// of the proxy. before says whether the KMS had trouble when the call began.
func (l *load) excused(err error, before bool) bool {
	st := status.Convert(err)
	return (before || l.trouble.Load()) && (st.Code() == codes.Unavailable || st.Code() == codes.FailedPrecondition) && strings.HasPrefix(st.Message(), "etcd-kms-proxy: rule ")
}

func (l *load) put(t *testing.T, kv pb.KVClient, key, value string) {
	before := l.trouble.Load()
	ctx, cancel := limited()
	defer cancel()
	l.puts.Add(1)
	_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
	if err == nil {
		l.set(key, value)
		return
	}
	// The error names the rule: the value could not be encrypted, and so was not sent.
	l.putErrors.Add(1)
	if !l.excused(err, before) {
		t.Errorf("put of %s: %v", key, err)
		l.set(key, append(l.may(key), value)...)
	}
}

func (l *load) get(t *testing.T, kv pb.KVClient, key string) {
	before := l.trouble.Load()
	ctx, cancel := limited()
	defer cancel()
	l.gets.Add(1)
	res, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		l.getErrors.Add(1)
		if !l.excused(err, before) {
			t.Errorf("get of %s: %v", key, err)
		}
		return
	}
	l.holds(t, key, res)
}

func (l *load) holds(t *testing.T, key string, res *pb.RangeResponse) {
	t.Helper()
	have := ""
	if len(res.Kvs) == 1 {
		have = string(res.Kvs[0].Value)
	}
	if may := l.may(key); !slices.Contains(may, have) {
		t.Errorf("%s holds a value that is none of the %d it may hold", key, len(may))
	}
}

// list reads all keys of a worker at once.
func (l *load) list(t *testing.T, kv pb.KVClient, worker int) {
	before := l.trouble.Load()
	ctx, cancel := limited()
	defer cancel()
	prefix := fmt.Sprintf("%sns-%d/", sealed, worker)
	res, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(prefix), RangeEnd: []byte(prefix[:len(prefix)-1] + "0")})
	if err != nil {
		if !l.excused(err, before) {
			t.Errorf("list of %s: %v", prefix, err)
		}
		return
	}
	for _, one := range res.Kvs {
		l.holds(t, string(one.Key), &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{one}})
	}
}

// checkAll reads everything after the KMS has recovered.
func (l *load) checkAll(t *testing.T) {
	t.Helper()
	kv := pb.NewKVClient(l.conn)
	l.mu.Lock()
	keys := make([]string, 0, len(l.keys))
	for key := range l.keys {
		keys = append(keys, key)
	}
	l.mu.Unlock()
	if len(keys) == 0 {
		t.Error("nothing was ever written")
	}
	for _, key := range keys {
		ctx, cancel := limited()
		res, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
		cancel()
		if err != nil {
			t.Errorf("get of %s after all troubles: %v", key, err)
			continue
		}
		l.holds(t, key, res)
	}
}
