package etcdapi

import (
	"errors"
	"log/slog"
	"regexp"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/logonce"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/valuetxn"
)

// Core is what all calls share: the current rules and the limits.
type Core struct {
	Rules      atomic.Pointer[RuleSet]
	MaxRequest int             // bytes; etcd's --max-request-bytes
	Gate       <-chan struct{} // nil, or closed once calls may continue
	// LearnerGate is closed once the calls that a learner serves may continue; nil if they wait for
	// Gate.
	LearnerGate <-chan struct{}
	log         *slog.Logger
	loggedLost  *logonce.Keys     // the texts of errors about lost values that were logged
	Turns       *valuetxn.Turns   // of transactions that compare by value
	Pinned      []listener.Config // that lead to one endpoint
}

// NewCore makes a Core with the rules in use, and a limit on requests in bytes.
func NewCore(rules *RuleSet, maxRequest int, log *slog.Logger) *Core {
	c := &Core{MaxRequest: maxRequest, log: log, loggedLost: logonce.NewKeys(lostKeys), Turns: valuetxn.NewTurns()}
	c.Rules.Store(rules)
	return c
}

// lostKeys is how many errors about lost values are remembered.
const lostKeys = 1024

// Call rewrites the messages of one call: every request message, and then every response message
// for which Scans is true. Messages are complete, without gRPC's header, and are not changed. One
// request and one response may be in progress at the same time, never two of a kind. Errors are
// statuses for the client, or [ErrWouldBlock]: then the same message is to be rewritten again.
type Call interface {
	// Request returns msg itself where nothing changes.
	Request(m Mode, msg []byte) ([]byte, error)
	Scans() bool
	// Parts says that a response may come in parts, each of whole fields: a long list needs no
	// buffer of its whole length.
	Parts() bool
	// Response appends the message for the client to dst, which does not overlap msg and has room
	// for as many bytes.
	Response(m Mode, dst, msg []byte) ([]byte, error)
}

// Splitter is a call whose responses may have to be split: while Splits is true, Split gets each
// complete response, as the client gets it. It does not change or keep it, and returns nil for one
// that is not split.
type Splitter interface {
	Splits() bool
	Split(msg []byte) ([][]byte, error)
}

var _ Splitter = (*watchCall)(nil)

// whole is for the calls whose responses do not come in parts.
type whole struct{}

func (whole) Parts() bool { return false }

// unread is for the calls whose responses pass as they are.
type unread struct{ whole }

func (unread) Scans() bool { return false }

func (unread) Response(_ Mode, dst, msg []byte) ([]byte, error) { return append(dst, msg...), nil }

// kvCall is what the calls of etcdserverpb.KV have in common. The rules may be swapped while a call
// is in flight: another client may then already have written under a new rule, so from then on
// every response is inspected.
type kvCall struct {
	core    *Core
	id      *listener.Identity
	memory  *CallMemory
	rules   *RuleSet // when the request came
	touches bool     // a response may hold an encrypted value
}

func (c *kvCall) Scans() bool {
	return !c.id.Ciphertext && (c.touches || c.core.Rules.Load() != c.rules)
}

// begin notes the rules of the moment and says whether there are any.
func (c *kvCall) begin() bool {
	c.rules = c.core.Rules.Load()
	return !c.rules.empty()
}

// requestID is what differs in the errors of two attempts to read one lost value: the KMS' own id
// of its call.
var requestID = regexp.MustCompile(`, request ID "[^"]*"`)

// status returns the status for err. It logs the cause where the client is not told, and each lost
// value once: a client may read it over and over, and not show the error to anyone.
func (c *Core) status(err error, fromEtcd bool) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, ErrWouldBlock) {
		return err // it is tried again
	}
	st, known := sealStatus(err, fromEtcd)
	if !known {
		c.log.Error("a value could not be encrypted or decrypted", "error", err)
	}
	if st := status.Convert(st); st.Code() == codes.DataLoss && c.loggedLost.First(requestID.ReplaceAllString(st.Message(), "")) {
		c.log.Error("a stored value cannot be read", "error", st.Message())
	}
	return st
}

// checkSize applies etcd's limit on a request to the plaintext, so that a client meets it where
// etcd alone would have put it. etcd measures the message that goes into its log: the request, its
// tag and length, and a header with a ten-byte request ID.
func (c *Core) checkSize(msg []byte) error {
	const raftHeader = 2 + 1 + 10
	if len(msg)+1+protowire.SizeVarint(uint64(len(msg)))+raftHeader > c.MaxRequest {
		return errRequestTooLarge
	}
	return nil
}

var _ etcdwire.Operations = (*txnCall)(nil)
