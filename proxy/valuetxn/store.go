package valuetxn

import (
	"context"
	"fmt"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// Store is etcd with plaintext values: it encrypts what it is sent, and decrypts what it
// responds. Its errors are statuses for the client.
type Store interface {
	// Overlaps reports whether a rule covers key (rangeEnd empty) or any key of [key, rangeEnd).
	Overlaps(key, rangeEnd []byte) bool
	// Range sends a range that does not sort by values under a rule. A response longer than
	// [MaxResponseBytes] is ResourceExhausted.
	Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error)
	// Txn sends a transaction that neither compares nor sorts by values under a rule. A response
	// longer than limit is ResourceExhausted.
	Txn(ctx context.Context, t *pb.TxnRequest, limit int) (*pb.TxnResponse, error)
}

// MaxResponseBytes bounds a response that is decoded and sorted as a whole, in bytes.
const MaxResponseBytes = 64 << 20

// explainTooLong tells a client what to do about a response that is too long to be sorted or
// compared.
func explainTooLong(err error) error {
	if !isTooLong(err) {
		return err
	}
	return rpc.Error(codes.ResourceExhausted, fmt.Sprintf(
		"values under a rule are compared and sorted here, and that is done for answers of %d MiB at most: ask for fewer keys (etcd: %s)", MaxResponseBytes>>20, status.Convert(err).Message()))
}

// isTooLong says that gRPC would not take the response. etcd has the same code for what it lacks
// itself, space among it.
func isTooLong(err error) bool {
	st := status.Convert(err)
	return st.Code() == codes.ResourceExhausted && strings.HasPrefix(st.Message(), "grpc: ")
}
