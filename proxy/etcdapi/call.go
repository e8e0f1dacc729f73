package etcdapi

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"sync/atomic"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/valuetxn"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/logonce"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// Core is what every engine shares: the rules of the moment and the limits.
type Core struct {
	Rules      atomic.Pointer[RuleSet]
	MaxRequest int             // bytes; etcd's --max-request-bytes
	Gate       <-chan struct{} // nil, or closed once calls may go on
	// LearnerGate is closed once those calls may go on that a learner serves; nil if they wait for gate.
	LearnerGate <-chan struct{}
	log         *slog.Logger
	loggedLost  *logonce.Keys     // the texts of errors about lost values that were logged
	Turns       *valuetxn.Turns   // of transactions that compare by value
	Pinned      []listener.Config // that lead to one endpoint
}

func NewCore(rules *RuleSet, maxRequest int, log *slog.Logger) *Core {
	c := &Core{MaxRequest: maxRequest, log: log, loggedLost: logonce.NewKeys(lostKeys), Turns: valuetxn.NewTurns()}
	c.Rules.Store(rules)
	return c
}

// lostKeys is how many errors about lost values are remembered.
const lostKeys = 1024

// Call rewrites the messages of one call. An engine hands it every request message, then every response message for which scans
// is true. Messages come whole, without gRPC's header; a result is the argument itself where nothing changes. A response may be overwritten, a request
// not, and a new response stands at the front of the old or in bytes of its own. One request and one response may
// be in progress at the same time, never two of a kind. Errors are statuses for the client, or [ErrWouldBlock].
type Call interface {
	Request(m Mode, msg []byte) ([]byte, error)
	Scans() bool
	// Parts says that a response may come in parts, each of whole fields: a long list needs no buffer of its whole length.
	Parts() bool
	Response(m Mode, msg []byte) ([]byte, error)
}

// Splitter is a call whose responses may have to be cut into several: while cuts is true it sees each response as the client gets it, in one piece, which it does not
// change or keep. cut returns nil for one that stays whole.
type Splitter interface {
	Splits() bool
	Split(msg []byte) ([][]byte, error)
}

var _ Splitter = (*watchCall)(nil)

// whole is for the calls whose responses do not come in parts.
type whole struct{}

func (whole) Parts() bool { return false }

// kvCall is what the calls of etcdserverpb.KV have in common. The rules may be swapped while a call is in flight: another client may then already
// have written under a new rule, so from then on every answer is looked into.
type kvCall struct {
	core    *Core
	id      *listener.Identity
	at      *RuleSet // the rules when the request came
	touches bool     // an answer may hold a sealed value
}

func (c *kvCall) Scans() bool {
	return !c.id.Ciphertext && (c.touches || c.core.Rules.Load() != c.at)
}

// begin notes the rules of the moment and says whether there are any.
func (c *kvCall) begin() bool {
	c.at = c.core.Rules.Load()
	return !c.at.empty()
}

// requestID is what differs in the errors of two attempts to read one lost value: the KMS' own id of its call.
var requestID = regexp.MustCompile(`, request ID "[^"]*"`)

// status returns the status for err. It logs the cause where the client is not told, and each lost value once: a client may read it over and over,
// and not show the error to anyone.
func (c *Core) status(err error, fromEtcd bool) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, ErrWouldBlock) {
		return err // it is tried again
	}
	st, known := sealStatus(err, fromEtcd)
	if !known {
		c.log.Error("a value could not be sealed or opened", "error", err)
	}
	if st := status.Convert(st); st.Code() == codes.DataLoss && c.loggedLost.First(requestID.ReplaceAllString(st.Message(), "")) {
		c.log.Error("a stored value cannot be read", "error", st.Message())
	}
	return st
}

// checkSize applies etcd's limit on a request to the plaintext, so that a client meets it where etcd alone would have put it. etcd measures
// the message that goes into its log: the request, its tag and length, and a header with a ten-byte request ID.
func (c *Core) checkSize(msg []byte) error {
	const raftHeader = 2 + 1 + 10
	if len(msg)+1+protowire.SizeVarint(uint64(len(msg)))+raftHeader > c.MaxRequest {
		return errRequestTooLarge
	}
	return nil
}

// rangeCall is a Range or a RangeStream.
type rangeCall struct {
	kvCall
	shape   etcdwire.RangeShape
	stream  bool
	byValue bool // it sorts by values that are sealed, or it is a stream under a rule and sorts by anything but keys
	refused bool // etcd is to refuse it
}

func newRangeCall(c *Core, id *listener.Identity) Call {
	return &rangeCall{kvCall: kvCall{core: c, id: id}}
}

func newRangeStreamCall(c *Core, id *listener.Identity) Call {
	return &rangeCall{kvCall: kvCall{core: c, id: id}, stream: true}
}

func (c *rangeCall) Request(_ Mode, msg []byte) ([]byte, error) {
	if !c.stream && upstream.IsProbe(msg) {
		return nil, upstream.ErrChained
	}
	if !c.begin() || c.id.Ciphertext {
		return msg, nil
	}
	var touches bool
	var err error
	c.shape, touches, err = etcdwire.RangeRequest(msg, tryRules{c.at})
	c.byValue = errors.Is(err, etcdwire.ErrByValue)
	if err != nil && !c.byValue {
		return nil, c.core.status(err, false)
	}
	c.touches = !c.shape.KeysOnly && touches
	if c.stream && (c.byValue || c.touches) {
		if err := c.decideStream(msg); err != nil {
			return nil, c.core.status(err, false)
		}
	}
	return msg, nil
}

// Parts implements call. A chunk of a stream is one field.
func (c *rangeCall) Parts() bool { return !c.stream }

func (c *rangeCall) Response(m Mode, msg []byte) ([]byte, error) {
	if c.refused { // it has sorted ciphertexts
		return nil, errSortedStream
	}
	rewrite := etcdwire.RangeResponse
	if c.stream {
		rewrite = etcdwire.RangeStreamResponse
	}
	out, err := rewrite(msg, m.Rules(c.core.Rules.Load()), c.shape)
	return out, c.core.status(err, true)
}

type putCall struct {
	whole
	kvCall
}

func newPutCall(c *Core, id *listener.Identity) Call {
	return &putCall{kvCall: kvCall{core: c, id: id}}
}

func (c *putCall) Request(m Mode, msg []byte) ([]byte, error) {
	if err := c.core.checkSize(msg); err != nil {
		return nil, err
	}
	if !c.begin() {
		return msg, nil
	}
	key, err := etcdwire.PutKey(msg)
	if err != nil {
		return nil, c.core.status(err, false)
	}
	if c.at.Own.has(key) {
		return nil, errOwnKey
	}
	c.touches = c.at.covers(key)
	out, err := etcdwire.PutRequest(msg, m.Rules(c.at))
	if errors.Is(err, etcdwire.ErrValueProvided) {
		return nil, c.refusedPut(msg)
	}
	return out, c.core.status(err, false)
}

// Response opens the previous value. When that fails the client gets the error although the put was applied, as it does when
// the answer of a write is lost on its way.
func (c *putCall) Response(m Mode, msg []byte) ([]byte, error) {
	out, err := etcdwire.PutResponse(msg, m.Rules(c.core.Rules.Load()))
	return out, c.core.status(err, true)
}

// refusedPut is the error for a put under a rule that has a value and is to keep the one there is.
// etcd refuses it, but would be sent the plaintext: so it is refused here, as etcd does.
func (c *putCall) refusedPut(msg []byte) error {
	put := new(pb.PutRequest)
	if err := rpc.Unmarshal(msg, put); err != nil {
		return c.core.status(err, false)
	}
	return cmp.Or(valuetxn.CheckPut(put), rpctypes.ErrGRPCValueProvided)
}

type deleteCall struct {
	whole
	kvCall
	over bool // its range reaches over keys of the proxies' own, which it leaves alone
}

func newDeleteCall(c *Core, id *listener.Identity) Call {
	return &deleteCall{kvCall: kvCall{core: c, id: id}}
}

func (c *deleteCall) Request(_ Mode, msg []byte) ([]byte, error) {
	if !c.begin() {
		return msg, nil
	}
	key, end, err := etcdwire.DeleteRangeRequest(msg)
	if err != nil {
		return nil, c.core.status(err, false)
	}
	reach := c.at.Own.reach(key, end)
	if reach == reachesOwn {
		return nil, errOwnKey
	}
	c.over = reach == reachesOver
	c.touches = c.at.Overlaps(key, end)
	return msg, nil
}

func (c *deleteCall) Response(m Mode, msg []byte) ([]byte, error) {
	out, err := etcdwire.DeleteRangeResponse(msg, m.Rules(c.core.Rules.Load()))
	return out, c.core.status(err, true)
}

type txnCall struct {
	whole
	kvCall
	shape   *etcdwire.TxnShape
	byValue bool // it compares or sorts by values that are sealed
	changes bool // it has a put or a delete, in any branch: etcd sends it through raft
	own     bool // some put or delete names keys of the proxies' own
	over    bool // some delete reaches over keys of the proxies' own, which it leaves alone
}

var _ etcdwire.Operations = (*txnCall)(nil)

// Range implements etcdwire.Operations.
func (c *txnCall) Range(key, end []byte) { c.touches = c.touches || c.at.Overlaps(key, end) }

// Put implements etcdwire.Operations.
func (c *txnCall) Put(key []byte) {
	c.changes = true
	c.own = c.own || c.at.Own.has(key)
	c.touches = c.touches || c.at.covers(key)
}

// Delete implements etcdwire.Operations.
func (c *txnCall) Delete(key, end []byte) {
	c.changes = true
	reach := c.at.Own.reach(key, end)
	c.own, c.over = c.own || reach == reachesOwn, c.over || reach == reachesOver
	c.touches = c.touches || c.at.Overlaps(key, end)
}

func newTxnCall(c *Core, id *listener.Identity) Call {
	return &txnCall{kvCall: kvCall{core: c, id: id}}
}

func (c *txnCall) Request(m Mode, msg []byte) ([]byte, error) {
	ruled := c.begin()
	tooLarge := c.core.checkSize(msg)
	if !ruled && tooLarge == nil && !c.id.ReadOnly() {
		return msg, nil
	}
	c.touches, c.changes, c.own, c.over = false, false, false, false // it may be the second time
	odd := etcdwire.EachOperation(msg, c)
	c.changes = c.changes || odd != nil
	switch {
	case c.changes && c.id.ReadOnly():
		return nil, errReadOnly
	case c.changes && tooLarge != nil: // a transaction that only reads never meets etcd's limit
		return nil, tooLarge
	case c.own:
		return nil, errOwnKey
	}
	if c.id.ReadOnly() {
		_, _, err := etcdwire.TxnRequest(msg, storedRules{})
		return msg, c.core.status(err, false)
	}
	if !ruled {
		return msg, nil
	}
	if odd != nil {
		return nil, c.core.status(odd, false)
	}
	out, shape, err := etcdwire.TxnRequest(msg, m.Rules(c.at))
	if errors.Is(err, etcdwire.ErrByValue) {
		c.byValue, c.touches = true, true
		return msg, nil
	}
	c.shape = shape
	return out, c.core.status(err, false)
}

func (c *txnCall) Response(m Mode, msg []byte) ([]byte, error) {
	out, err := etcdwire.TxnResponse(msg, m.Rules(c.core.Rules.Load()), c.shape)
	return out, c.core.status(err, true)
}

// electionCall is a call of etcd's Election or Lock service. Where a rule covers its keys, the service is the one that is run here.
type electionCall struct {
	whole
	core   *Core
	id     *listener.Identity
	about  func(msg []byte) (span, error)
	writes bool
	hosted bool
}

func electing(about func([]byte) (span, error), a access) func(*Core, *listener.Identity) Call {
	return func(c *Core, id *listener.Identity) Call {
		return &electionCall{core: c, id: id, about: about, writes: a == writes}
	}
}

func (c *electionCall) Request(_ Mode, msg []byte) ([]byte, error) {
	rules := c.core.Rules.Load()
	if rules.empty() {
		return msg, nil
	}
	keys, err := c.about(msg)
	if err != nil {
		return nil, c.core.status(err, false)
	}
	// What is written is the one key, or one that goes on with the lease's ID: in hexadecimal
	// digits, so it is an own key only if what it begins with is.
	if c.writes && rules.Own.reach(keys.key, nil) == reachesOwn {
		return nil, errOwnKey
	}
	c.hosted = rules.Overlaps(keys.key, keys.end) && !c.id.ReadOnly() // a client that is given stored bytes gets those of etcd's own service
	return msg, nil
}

func (*electionCall) Scans() bool { return false }

func (*electionCall) Response(_ Mode, msg []byte) ([]byte, error) { return msg, nil }

// namedKeys are the keys of an election or lock: all that begin with its name and a slash.
func namedKeys(msg []byte) (span, error) {
	name, err := etcdwire.Name(msg)
	if err != nil {
		return span{}, fmt.Errorf("name: %w", err)
	}
	start := append(bytes.Clone(name), '/')
	return span{start, after(start)}, nil
}

// leaderKey is the key of a leader.
func leaderKey(msg []byte) (span, error) {
	key, err := etcdwire.LeaderKey(msg)
	if err != nil {
		return span{}, fmt.Errorf("leader key: %w", err)
	}
	return span{key: key}, nil
}

// lockKey is the key that an Unlock removes.
func lockKey(msg []byte) (span, error) {
	key, err := etcdwire.Name(msg)
	if err != nil {
		return span{}, fmt.Errorf("key: %w", err)
	}
	return span{key: key}, nil
}
