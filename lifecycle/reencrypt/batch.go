package reencrypt

import (
	"sync/atomic"
)

// item is a value to write.
type item struct {
	key      string
	value    []byte // the new stored value
	revision int64  // of the old value
	lease    int64  // of the key at that revision
	attempts int    // that lost against a write of another client
	decrypts bool   // value is plaintext, by its rule
}

// opOverhead is the size of a compare, a put and a get in a transaction without keys and value:
// lengths, tags and revisions.
const opOverhead = 96

func (i *item) size() int { return 3*len(i.key) + len(i.value) + opOverhead }

// batch is the content of one transaction.
type batch struct {
	items []*item
	size  int
}

func (b *batch) add(i *item) {
	b.items, b.size = append(b.items, i), b.size+i.size()
}

// take returns the items and empties the batch.
func (b *batch) take() []*item {
	items := b.items
	*b = batch{}
	return items
}

// maxBatch limits a transaction of several values, because larger ones delay other clients of etcd.
const maxBatch = 512 << 10

// limits are the limits of one transaction, lowered when etcd refuses one.
type limits struct{ keys, bytes atomic.Int64 }

// set sets the limits. It leaves room for what etcd adds to a request before it checks the size.
func (l *limits) set(keys, bytes int) {
	l.keys.Store(int64(keys))
	l.bytes.Store(int64(min(maxBatch, bytes*9/10)))
}

func (l *limits) maxKeys() int { return int(l.keys.Load()) }

// allow reports whether an item may join a batch. The first one always may, because only etcd can
// decide whether it is too large.
func (l *limits) allow(b *batch, i *item) bool {
	return len(b.items) == 0 || len(b.items) < l.maxKeys() && b.size+i.size() <= int(l.bytes.Load())
}

// fewerKeys lowers the limit after etcd refused n keys.
func (l *limits) fewerKeys(n int) { lower(&l.keys, int64(max(1, n/2))) }

// fewerBytes lowers the limit after etcd refused n bytes.
func (l *limits) fewerBytes(n int) { lower(&l.bytes, int64(max(1, n/2))) }

func lower(limit *atomic.Int64, to int64) {
	for {
		was := limit.Load()
		if was <= to || limit.CompareAndSwap(was, to) {
			return
		}
	}
}

// parts splits items into batches within the limits.
func (l *limits) parts(items []*item) [][]*item {
	var all [][]*item
	var b batch
	for _, i := range items {
		if !l.allow(&b, i) {
			all = append(all, b.take())
		}
		b.add(i)
	}
	if len(b.items) > 0 {
		all = append(all, b.take())
	}
	return all
}

func sizeOf(items []*item) int {
	n := 0
	for _, i := range items {
		n += i.size()
	}
	return n
}
