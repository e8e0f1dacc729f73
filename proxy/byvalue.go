package proxy

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// Compares and sorts by values that are sealed are done here, since etcd has only ciphertexts. Such a request is decoded, and etcd is asked something else, perhaps more than
// once; every message on its way to etcd goes through etcdwire again, which lets no value under a rule through.

const (
	methodRange = "/etcdserverpb.KV/Range"
	methodTxn   = "/etcdserverpb.KV/Txn"
	// maxByValue bounds an answer that is opened, decoded and sorted as a whole, in bytes.
	maxByValue = 64 << 20
)

// asker sends one request to etcd, with the client's metadata, and returns the answer, which is the caller's. An answer longer than limit is ResourceExhausted.
type asker func(ctx context.Context, method string, msg []byte, limit int) ([]byte, error)

// exchanger is a call that has more to do than to rewrite one request and its answer: if exchanges is true after the request was seen, exchange does it all. msg is the
// client's message, which it does not change; the answer is for the client.
type exchanger interface {
	exchanges() bool
	exchange(ctx context.Context, msg []byte, ask asker) ([]byte, error)
}

var (
	_ exchanger = (*rangeCall)(nil)
	_ exchanger = (*txnCall)(nil)
)

func (c *rangeCall) exchanges() bool { return c.byValue }

func (c *txnCall) exchanges() bool { return c.byValue || c.over }

func decode(msg []byte, into proto.Message) error {
	if err := proto.Unmarshal(msg, into); err != nil {
		return fmt.Errorf("%w: it cannot be decoded", etcdwire.ErrMalformed)
	}
	return nil
}

func encode(m proto.Message) ([]byte, error) {
	out, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", m, err)
	}
	return out, nil
}

// askRange asks etcd for a range, and returns its answer with the values opened.
func (c *kvCall) askRange(ctx context.Context, r *pb.RangeRequest, ask asker) (*pb.RangeResponse, error) {
	msg, err := encode(r)
	if err != nil {
		return nil, c.core.status(err, false)
	}
	shape, _, err := etcdwire.RangeRequest(msg, tryingRules{c.at})
	if err != nil {
		return nil, c.core.status(err, false)
	}
	answer, err := ask(ctx, methodRange, msg, maxByValue)
	if err != nil {
		return nil, err
	}
	answer, err = etcdwire.RangeResponse(answer, blocking(ctx).over(c.core.rules.Load()), shape)
	if err != nil {
		return nil, c.core.status(err, true)
	}
	out := new(pb.RangeResponse)
	if err := decode(answer, out); err != nil {
		return nil, c.core.status(err, true)
	}
	return out, nil
}

// askTxn asks etcd for a transaction, and returns its answer, of limit bytes at most, with the
// values opened.
func (c *kvCall) askTxn(ctx context.Context, t *pb.TxnRequest, limit int, ask asker) ([]byte, error) {
	msg, err := encode(t)
	if err != nil {
		return nil, c.core.status(err, false)
	}
	msg, shape, err := etcdwire.TxnRequest(msg, blocking(ctx).over(c.at))
	if err != nil {
		return nil, c.core.status(err, false)
	}
	answer, err := ask(ctx, methodTxn, msg, limit)
	if err != nil {
		return nil, err
	}
	answer, err = etcdwire.TxnResponse(answer, blocking(ctx).over(c.core.rules.Load()), shape)
	return answer, c.core.status(err, true)
}

// tooMuch tells a client what to do about an answer that is too long to be sorted or compared.
func tooMuch(err error) error {
	if !overlong(err) {
		return err
	}
	return ownError(codes.ResourceExhausted, fmt.Sprintf(
		"values under a rule are compared and sorted here, and that is done for answers of %d MiB at most: ask for fewer keys (etcd: %s)", maxByValue>>20, status.Convert(err).Message()))
}

// overlong says that gRPC would not take the answer. etcd has the same code for what it lacks itself, space among it.
func overlong(err error) bool {
	st := status.Convert(err)
	return st.Code() == codes.ResourceExhausted && strings.HasPrefix(st.Message(), "grpc: ")
}
