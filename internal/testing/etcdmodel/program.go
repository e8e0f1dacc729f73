package etcdmodel

import (
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// Program makes requests of bytes, so that nearly all bytes make requests that mean something: few
// keys, few values, revisions around those that there are. Bytes that are missing are zeros, and
// zeros are plain.
type Program struct{ bytes []byte }

// Leases are the leases that a program uses beside one that is never granted.
var Leases = []int64{1, 2}

// MaxOps is the limit on the operations of a transaction that programs meet now and then.
const MaxOps = 16

// Step is one request of a program, and what others do meanwhile.
type Step struct {
	Request proto.Message
	Between []Write
}

// Write is what somebody else does before the request of the given number that the step leads to; 0
// is the first.
type Write struct {
	Before  int
	Request proto.Message
}

// maxSteps bounds a program.
const maxSteps = 24

// keys stand on both sides of "s/" and "s/p/".
var keys = []string{"s/a", "s/b", "s/c", "s/p/x", "s/p/y", "t/a", "t/b", "s/", "s", "s0", "s/p/", "s/p0", "\x00", "\xff"}

var values = []string{"a", "a", "a", "b", "", "ab", "ba", "\x00", "a longer value that nobody expects"}

// NewProgram reads at most maxSteps requests out of bytes, which it retains.
func NewProgram(bytes []byte) *Program { return &Program{bytes} }

// Run has do answer the requests of a program, one after the other; now tells the revision of the
// moment. It begins with a put for each bit of the first byte, and ends when the bytes do, or with
// do's error.
func (p *Program) Run(now func() int64, do func(Step) error) error {
	first := p.below(256)
	for i := range 8 {
		if first>>i&1 != 0 {
			if err := do(Step{Request: &pb.PutRequest{Key: []byte(keys[i]), Value: []byte(values[0])}}); err != nil {
				return err
			}
		}
	}
	for range maxSteps {
		if len(p.bytes) == 0 {
			return nil
		}
		if err := do(p.step(now())); err != nil {
			return err
		}
	}
	return nil
}

func (p *Program) next() byte {
	if len(p.bytes) == 0 {
		return 0
	}
	b := p.bytes[0]
	p.bytes = p.bytes[1:]
	return b
}

// below returns a number below n, of one byte.
func (p *Program) below(n int) int { return int(p.next()) % n }

func (p *Program) enum(n byte) int32 { return int32(p.next() % n) }

// one says yes once in n times, and never without bytes.
func (p *Program) one(n int) bool { return p.below(n) == n-1 }

func (p *Program) step(now int64) Step {
	s := Step{Request: p.request(now)}
	switch s.Request.(type) {
	case *pb.RangeRequest, *pb.TxnRequest:
	default:
		return s
	}
	for range max(0, p.below(6)-2) {
		w := Write{Before: p.below(4)}
		key := p.key()
		if txn, ok := s.Request.(*pb.TxnRequest); ok && len(txn.GetCompare()) > 0 && !p.one(4) {
			key = txn.GetCompare()[p.below(len(txn.GetCompare()))].GetKey()
		}
		switch p.below(8) {
		case 0, 1, 2, 3:
			w.Request = &pb.PutRequest{Key: key, Value: p.value(), Lease: p.lease()}
		case 7:
			w.Request = &pb.CompactionRequest{Revision: max(1, now+2-int64(p.below(5)))}
		default:
			w.Request = &pb.DeleteRangeRequest{Key: key}
		}
		s.Between = append(s.Between, w)
	}
	return s
}

func (p *Program) request(now int64) proto.Message {
	switch p.below(10) {
	case 0, 1:
		return p.put()
	case 2, 3:
		return p.get(now)
	case 4:
		if p.one(3) {
			return &pb.CompactionRequest{Revision: max(1, now+2-int64(p.below(8)))}
		}
		return p.deletion()
	}
	return p.txn(now, 0)
}

func (p *Program) key() []byte {
	if p.one(100) {
		return nil
	}
	return []byte(keys[p.below(len(keys))])
}

func (p *Program) value() []byte { return []byte(values[p.below(len(values))]) }

// lease draws a lease, mostly none. 3 was not granted.
func (p *Program) lease() int64 { return []int64{11: 1, 12: 1, 13: 2, 14: 2, 15: 3}[p.below(16)] }

// span draws a range end for a key: mostly none.
func (p *Program) span() []byte {
	switch p.below(8) {
	case 4:
		return []byte("s0")
	case 5:
		return []byte("s/p0")
	case 6:
		return []byte{0}
	case 7:
		return p.key()
	}
	return nil
}

func (p *Program) put() *pb.PutRequest {
	r := &pb.PutRequest{Key: p.key(), Value: p.value(), Lease: p.lease()}
	flags := p.below(32)
	r.PrevKv = flags&1 != 0
	if flags >= 24 {
		r.IgnoreValue, r.IgnoreLease = flags&2 != 0, flags&4 != 0
		if !p.one(8) { // else it is refused
			if r.IgnoreValue {
				r.Value = nil
			}
			if r.IgnoreLease {
				r.Lease = 0
			}
		}
	}
	return r
}

func (p *Program) deletion() *pb.DeleteRangeRequest {
	r := &pb.DeleteRangeRequest{Key: p.key(), RangeEnd: p.span(), PrevKv: p.one(2)}
	if string(r.RangeEnd) == "\x00" {
		// etcd does not see that such a range meets a put of the same transaction, and panics if
		// that put was to keep the value of the key that is gone.
		r.RangeEnd = []byte("\xff\xff")
	}
	return r
}

// revision draws one around the present; 0 is the present itself.
func (p *Program) revision(now int64) int64 {
	if n := p.below(16); n > 6 {
		return max(0, now+9-int64(n))
	}
	return 0
}

func (p *Program) get(now int64) *pb.RangeRequest {
	r := &pb.RangeRequest{Key: p.key(), RangeEnd: p.span(), Revision: p.revision(now)}
	flags := p.below(64)
	r.Serializable, r.KeysOnly, r.CountOnly = flags&1 != 0, flags&6 == 6, flags&56 == 56
	r.Limit = int64(max(0, p.below(8)-3))
	if order := p.below(8); order > 2 {
		r.SortOrder, r.SortTarget = pb.RangeRequest_SortOrder(order%3), pb.RangeRequest_VALUE
		if p.one(2) {
			r.SortTarget = pb.RangeRequest_SortTarget(p.enum(6)) // 5 is none
		}
		if p.one(32) {
			r.SortOrder = 7
		}
	}
	if p.one(4) {
		r.MinModRevision, r.MaxModRevision = p.revision(now), p.revision(now)
		r.MinCreateRevision, r.MaxCreateRevision = p.revision(now), p.revision(now)
	}
	return r
}

func (p *Program) compare(now int64) *pb.Compare {
	c := &pb.Compare{Key: p.key(), RangeEnd: p.span(), Result: pb.Compare_CompareResult(p.enum(4))}
	kind := p.below(10)
	switch kind {
	case 0:
		c.Target, c.TargetUnion = pb.Compare_MOD, &pb.Compare_ModRevision{ModRevision: p.revision(now)}
	case 1:
		c.Target, c.TargetUnion = pb.Compare_CREATE, &pb.Compare_CreateRevision{CreateRevision: p.revision(now)}
	case 2:
		c.Target, c.TargetUnion = pb.Compare_VERSION, &pb.Compare_Version{Version: int64(p.below(4))}
	case 3:
		c.Target, c.TargetUnion = pb.Compare_LEASE, &pb.Compare_Lease{Lease: p.lease()}
	default:
		c.Target, c.TargetUnion = pb.Compare_VALUE, &pb.Compare_Value{Value: p.value()}
	}
	switch p.below(24) {
	case 21:
		c.TargetUnion = nil
	case 22:
		// the operand may be of another kind; 5 is none
		c.Target = pb.Compare_CompareTarget(p.enum(6))
	case 23:
		c.Result = 7
	}
	return c
}

// size draws how many there are of something: few, or about as many as the limit.
func (p *Program) size() int {
	if n := p.below(48); n >= 45 {
		return MaxOps - 46 + n
	}
	return p.below(3)
}

func (p *Program) txn(now int64, depth int) *pb.TxnRequest {
	r := &pb.TxnRequest{}
	for range p.size() {
		r.Compare = append(r.Compare, p.compare(now))
	}
	r.Success, r.Failure = p.branch(now, depth), p.branch(now, depth)
	return r
}

// branch lets few put or delete one key twice, since all that do are refused.
func (p *Program) branch(now int64, depth int) (ops []*pb.RequestOp) {
	met := make(map[string]bool)
	fresh := func(key []byte) bool {
		again := met[string(key)]
		met[string(key)] = true
		return !again || p.one(16)
	}
	for range p.size() {
		switch kind := p.below(16); {
		case kind < 5:
			if r := p.put(); fresh(r.GetKey()) {
				ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: r}})
			}
		case kind < 8:
			r := p.deletion()
			if !p.one(4) {
				r.RangeEnd = nil // it mostly meets a put
			}
			if fresh(r.GetKey()) {
				ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: r}})
			}
		case kind < 11 || depth == 3:
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: p.get(now)}})
		case kind < 15:
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: p.txn(now, depth+1)}})
		case p.one(4):
			ops = append(ops, &pb.RequestOp{}) // it is no operation
		}
	}
	return ops
}
