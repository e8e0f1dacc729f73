package stored

import (
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/reencrypt"
)

// TestReencryptView: without a terminal, a line now and then tells how far it is and how long it
// takes; and the cost is said with a warning where there is no room.
func TestReencryptView(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	v := newReencryptView(&out)
	v.progress(reencrypt.Progress{Pass: 1, Keys: 5})
	if out.Len() > 0 {
		t.Errorf("told at once: %s", out.String())
	}
	late := func() { v.last = time.Now().Add(-lineInterval) }
	late()
	v.progress(reencrypt.Progress{Pass: 1, Keys: 5})
	planned := reencrypt.Result{Progress: reencrypt.Progress{Keys: 200, Rewritten: 100, Transactions: 100, Bytes: 3 << 20}}
	v.showCost(planned, []*clientv3.StatusResponse{
		{Header: &pb.ResponseHeader{MemberId: 0xa}, DbSizeInUse: 1 << 20, DbSizeQuota: 100 << 20},
		{Header: &pb.ResponseHeader{MemberId: 0xb}, DbSizeInUse: 9 << 20, DbSizeQuota: 14 << 20, Errors: []string{"alarm:NOSPACE"}},
		{Header: &pb.ResponseHeader{MemberId: 0xc}, DbSizeInUse: 9 << 20},
	})
	v.begin(planned)
	v.begun = time.Now().Add(-10 * time.Second)
	late()
	v.progress(reencrypt.Progress{Pass: 1, Keys: 150, Rewritten: 50})
	late()
	v.progress(reencrypt.Progress{Pass: 2, Keys: 150, Rewritten: 100})
	want := `counting: 5
100 of 200 values will be rewritten: 100 revisions, an event for the watchers of each value, and at least 3.0 MiB in etcd's database until it is compacted and defragmented
warning: member b uses 9.0 MiB of its quota of 14.0 MiB: compact and defragment first, or raise --quota-backend-bytes
warning: member b reports alarm:NOSPACE
rewriting: 50 of 100, 5 a second, 10s left
checking: 150 of 200
`
	if got := out.String(); got != want {
		t.Errorf("said:\n%s\nwant:\n%s", got, want)
	}
}
