package proxy

import (
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestReferenceThatLeaves: a call that comes just as the connection to the reference engine closes, for want of calls, gets another.
func TestReferenceThatLeaves(t *testing.T) {
	if testing.Short() {
		t.Skip("it tries for some seconds")
	}
	before := referenceIdle
	referenceIdle = time.Millisecond
	proxy := startProxy(t, serveFake(t, &fakeEtcd{}), nil, nil)
	t.Cleanup(func() { proxy.stop(); referenceIdle = before })
	var all sync.WaitGroup
	for i := range 32 {
		conn := proxy.dial(t)
		all.Go(func() {
			for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
				time.Sleep(time.Millisecond - time.Duration(i)*10*time.Microsecond)
				if _, err := pb.NewClusterClient(conn).MemberList(testContext(t), &pb.MemberListRequest{}); status.Code(err) != codes.Unimplemented {
					t.Errorf("%v", err)
				}
			}
		})
	}
	all.Wait()
}
