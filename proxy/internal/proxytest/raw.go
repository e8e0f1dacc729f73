package proxytest

import (
	"context"
	"errors"
	"io"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// RawCall sends msg to a method as it stands, and returns the first answer.
func RawCall(ctx context.Context, conn *grpc.ClientConn, method string, msg []byte) ([]byte, error) {
	desc := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
	s, err := conn.NewStream(ctx, desc, method, grpc.ForceCodecV2(rpc.Codec{}))
	if err != nil {
		return nil, err
	}
	if err := s.SendMsg(&rpc.Message{Data: mem.BufferSlice{mem.SliceBuffer(msg)}}); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if err := s.CloseSend(); err != nil {
		return nil, err
	}
	out := new(rpc.Message)
	if err := s.RecvMsg(out); err != nil {
		return nil, err
	}
	got := out.Data.Materialize()
	for err == nil {
		err = s.RecvMsg(out)
	}
	return got, nil
}

// ServeRaw starts an etcd that answers every call with the same bytes.
func ServeRaw(t testing.TB, answer []byte) string {
	t.Helper()
	return ServeAll(t, func(_ any, ss grpc.ServerStream) error {
		if err := ss.RecvMsg(new(rpc.Message)); err != nil {
			return err
		}
		return ss.SendMsg(&rpc.Message{Data: mem.BufferSlice{mem.SliceBuffer(answer)}})
	})
}

// ServeAll starts an etcd whose calls are all handled by one function, which gets frames.
func ServeAll(t testing.TB, handler grpc.StreamHandler) string {
	t.Helper()
	l := ListenLoopback(t)
	s := grpc.NewServer(grpc.ForceServerCodecV2(rpc.Codec{}), grpc.UnknownServiceHandler(handler), grpc.WaitForHandlers(true))
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return l.Addr().String()
}
