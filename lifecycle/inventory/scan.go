package inventory

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/restore"
)

// Pages are sized by bytes, because values have between 0 bytes and 1.5 MiB. The first page is
// small. Each next one requests as many keys as would have filled pageBytes. Larger pages are
// faster where keys are many, because etcd counts all keys that follow for each page.
const (
	firstPage = 32
	maxPage   = 20_000
	pageBytes = 2 << 20
	keyBytes  = 128 // what a key takes besides its own bytes and its value's
)

// Span is the range of revisions that a scan has read at. First and Last differ only if First was
// compacted during the scan.
type Span struct {
	First int64 `json:"first"`
	Last  int64 `json:"last"`
}

// Scan calls visit with each key and value below prefixes, none of which may begin with another
// one, in order. It reads pages at one revision: the current one if rev is 0. If that revision is
// compacted during the scan, the rest is read at the revision that is then current, and Span shows
// it. The scan ends with an error of visit, and with [restore.ErrRestored] if etcd is restored
// during it. visit may keep the KeyValue.
func Scan(ctx context.Context, kv clientv3.KV, prefixes []string, rev int64, visit func(*mvccpb.KeyValue) error) (Span, error) {
	return ScanWith(ctx, new(restore.Detector), kv, prefixes, rev, visit)
}

// ScanWith is [Scan] with a detector that has observed earlier responses.
func ScanWith(ctx context.Context, history *restore.Detector, kv clientv3.KV, prefixes []string, rev int64, visit func(*mvccpb.KeyValue) error) (Span, error) {
	s := scan{kv: kv, history: history, visit: visit, limit: firstPage, at: rev, span: Span{First: rev, Last: rev}}
	for _, p := range prefixes {
		if err := s.prefix(ctx, p); err != nil {
			return s.span, err
		}
	}
	return s.span, nil
}

type scan struct {
	kv      clientv3.KV
	history *restore.Detector
	visit   func(*mvccpb.KeyValue) error
	limit   int64
	at      int64 // revision; 0: the present one
	span    Span
}

func (s *scan) prefix(ctx context.Context, prefix string) error {
	from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
	if prefix == "" {
		from, end = "\x00", "\x00" // every key
	}
	for {
		page, err := s.page(ctx, from, end)
		if err != nil {
			return fmt.Errorf("read the keys below %q: %w", prefix, err)
		}
		var bytes int64
		for _, kv := range page.Kvs {
			bytes += int64(keyBytes + len(kv.Key) + len(kv.Value))
			if err := s.visit(kv); err != nil {
				return err
			}
		}
		if !page.More || len(page.Kvs) == 0 {
			return nil
		}
		from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
		n := int64(len(page.Kvs))
		s.limit = min(maxPage, 4*n, max(1, pageBytes*n/max(1, bytes)))
	}
}

// page reads the next page, with fewer keys if they exceed the message size limit.
func (s *scan) page(ctx context.Context, from, end string) (*clientv3.GetResponse, error) {
	for {
		before := s.history.Position()
		r, err := s.kv.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(s.limit), clientv3.WithRev(s.at))
		switch {
		case err == nil && s.history.Compare(before, r.Header), s.at != 0 && errors.Is(err, rpctypes.ErrFutureRev):
			return nil, restore.ErrRestored
		case err == nil:
			if s.at == 0 {
				s.at = r.Header.Revision
				s.span.Last = s.at
				if s.span.First == 0 {
					s.span.First = s.at
				}
			}
			return r, nil
		case errors.Is(err, rpctypes.ErrCompacted) && s.at != 0:
			s.at = 0
		case status.Code(err) == codes.ResourceExhausted && s.limit > 1:
			s.limit = max(1, s.limit/8)
		default:
			return nil, err
		}
	}
}
