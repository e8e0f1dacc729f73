package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/canary"
)

// present are the environments of running tests. A connection may belong to any of them, and a
// client must not get a secret of any of them.
var present struct {
	sync.RWMutex
	envs map[*Env]bool
}

func (e *Env) enter() {
	present.Lock()
	defer present.Unlock()
	if present.envs == nil {
		present.envs = map[*Env]bool{}
	}
	present.envs[e] = true
}

func (e *Env) leave() {
	present.Lock()
	defer present.Unlock()
	delete(present.envs, e)
}

// searchError fails the test whose secrets are in an error that a client got: in its text or its
// details.
func searchError(target, method string, err error) {
	if err == nil || errors.Is(err, io.EOF) {
		return
	}
	answer := status.Convert(err).Proto()
	text := []byte(answer.GetMessage())
	for _, d := range answer.GetDetails() {
		text = fmt.Appendf(text, "\n%s\n%s", d.TypeUrl, d.Value)
	}
	present.RLock()
	defer present.RUnlock() // only now may the test end
	for e := range present.envs {
		for _, set := range []*canary.Set{e.Sealed, e.Clear} {
			for _, f := range set.Search("an answer of "+target+" to "+method, text) {
				e.TB.Errorf("a secret stands in what a client is told: %v", f)
			}
		}
	}
}

// SearchErrors returns options for a connection whose errors are searched for secrets, like those
// of [Dial].
func SearchErrors() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, call grpc.UnaryInvoker, options ...grpc.CallOption) error {
			err := call(ctx, method, request, reply, conn, options...)
			searchError(conn.Target(), method, err)
			return err
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, options ...grpc.CallOption) (grpc.ClientStream, error) {
			stream, err := open(ctx, desc, conn, method, options...)
			if err != nil {
				searchError(conn.Target(), method, err)
				return nil, err
			}
			return searchedStream{stream, conn.Target(), method}, nil
		}),
	}
}

// searchedStream is a stream whose status is searched.
type searchedStream struct {
	grpc.ClientStream
	target, method string
}

// RecvMsg implements [grpc.ClientStream]. Every end of a stream is seen here, except for a stream
// that nobody reads.
func (s searchedStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	searchError(s.target, s.method, err)
	return err
}
