package proxy

import (
	"context"
	"errors"
	"io"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
)

// rawCall sends msg to a method as it stands, and returns the first answer.
func rawCall(ctx context.Context, conn *grpc.ClientConn, method string, msg []byte) ([]byte, error) {
	desc := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
	s, err := conn.NewStream(ctx, desc, method, grpc.ForceCodecV2(rawCodec{}))
	if err != nil {
		return nil, err
	}
	if err := s.SendMsg(&frame{data: mem.BufferSlice{mem.SliceBuffer(msg)}}); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if err := s.CloseSend(); err != nil {
		return nil, err
	}
	out := new(frame)
	if err := s.RecvMsg(out); err != nil {
		return nil, err
	}
	got := out.data.Materialize()
	for err == nil {
		err = s.RecvMsg(out)
	}
	return got, nil
}

// serveRaw starts an etcd that answers every call with the same bytes.
func serveRaw(t testing.TB, answer []byte) string {
	t.Helper()
	return serveAll(t, func(_ any, ss grpc.ServerStream) error {
		if err := ss.RecvMsg(new(frame)); err != nil {
			return err
		}
		return ss.SendMsg(&frame{data: mem.BufferSlice{mem.SliceBuffer(answer)}})
	})
}

// serveAll starts an etcd whose calls are all handled by one function, which gets frames.
func serveAll(t testing.TB, handler grpc.StreamHandler) string {
	t.Helper()
	l := listenLoopback(t)
	s := grpc.NewServer(grpc.ForceServerCodecV2(rawCodec{}), grpc.UnknownServiceHandler(handler), grpc.WaitForHandlers(true))
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return l.Addr().String()
}
