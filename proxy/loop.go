package proxy

import (
	"context"
	"math"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
)

// loopBuffer is how many bytes may be on their way within the process, in each direction.
const loopBuffer = 256 << 10

// loop returns a connection to the engine from within the process, in the name of id: what comes over it goes the way of everything else. It connects when it is first used.
// The caller closes it.
func loop(e engine, id *Identity) (*grpc.ClientConn, error) {
	return within(func(conn net.Conn) { e.serve(&clientConn{Conn: conn, id: id, closed: func() {}}) })
}

// within connects to whoever takes the other end.
func within(take func(net.Conn)) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///within",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			l := bufconn.Listen(loopBuffer)
			defer l.Close() //nolint:errcheck // never fails
			go func() {
				if conn, err := l.Accept(); err == nil {
					take(conn)
				}
			}()
			return l.DialContext(ctx)
		}),
		grpc.WithDisableRetry(), grpc.WithIdleTimeout(0),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32)),
	)
}
