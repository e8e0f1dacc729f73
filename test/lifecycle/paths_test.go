package lifecycle

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// pathValue is a value that etcd stores under the rule, and the expected result of each path.
type pathValue struct {
	name   string
	stored []byte
	// yields is what clients read, or nil if they get an error.
	yields []byte
	// handedOn says that clients get the stored bytes although they cannot be decrypted. No command
	// may treat these as a value.
	handedOn bool
	// renewed says that reencrypt rewrites it.
	renewed bool
	// clear says that verify reports it: it can be read in etcd's files, or does not decrypt.
	clear bool
	// past says that the bypass watch counts it: it does not begin like a value of the rule's
	// providers.
	past bool
}

func (v *pathValue) folder() string { return prefix + v.name + "/" }

func (v *pathValue) key() string { return v.folder() + "obj" }

// objectAt returns an object as kube-apiserver stores it, of a namespace and with the name "obj".
func objectAt(namespace string) []byte {
	return fmt.Appendf(nil, `{"apiVersion":"v1","kind":"Secret","metadata":{"name":"obj","namespace":%q}}`+"\n", namespace)
}

// aescbc encrypts like the API server's own provider.
func aescbc(t *testing.T, name string, secret, plaintext []byte) []byte {
	t.Helper()
	block, err := aes.NewCipher(secret)
	if err != nil {
		t.Fatal(err)
	}
	n := aes.BlockSize - len(plaintext)%aes.BlockSize
	out := append(bytes.Clone(plaintext), bytes.Repeat([]byte{byte(n)}, n)...)
	iv := []byte("sixteen bytes IV")
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(out, out)
	return slices.Concat([]byte("k8s:enc:aescbc:v1:"+name+":"), iv, out)
}

// TestEveryPath checks that what one path refuses, no other path returns or makes authentic, for
// every stored value, whether the rule allows plaintext or not.
func TestEveryPath(t *testing.T) {
	t.Parallel()
	for _, strict := range []bool{true, false} {
		t.Run(map[bool]string{true: "strict", false: "lenient"}[strict], func(t *testing.T) {
			t.Parallel()
			testEveryPath(t, strict)
		})
	}
}

func testEveryPath(t *testing.T, strict bool) {
	s := &site{Env: harness.New(t)}
	s.etcd = s.StartEtcd(harness.EtcdConfig{Bare: true})
	secret := []byte("the key of the API server itself")
	keys := s.File("aescbc.yaml", fmt.Appendf(nil, "keys: [{name: key1, secret: %s}]\n", base64.StdEncoding.EncodeToString(secret)))
	s.proxy = s.StartProxy("proxy", harness.ProxyConfig{
		Etcd:  harness.Upstream{Endpoints: []string{s.etcd.URL}},
		KMS:   []harness.KMSConfig{s.LocalKey("dev", 1), {Name: "old", Kubernetes: &harness.KubernetesKeys{Type: "aescbc", KeyFile: keys}}},
		Rules: []harness.Rule{{Prefix: prefix, WriteWith: "dev", ReadWith: []string{"old"}, AllowPlaintextReads: new(!strict)}},
		Audit: &harness.Audit{Path: filepath.Join(s.Dir, "audit.jsonl")},
	})
	s.proxy.WaitReady(within)
	s.raw = pb.NewKVClient(harness.Dial(t, s.etcd.Address, nil))
	s.kv = pb.NewKVClient(harness.Dial(t, s.proxy.Address, nil))

	put(t, s.kv, prefix+"genuine/obj", "genuine")
	r, err := s.raw.Range(t.Context(), &pb.RangeRequest{Key: []byte(prefix + "genuine/obj")})
	if err != nil {
		t.Fatal(err)
	}
	genuine := r.Kvs[0].Value
	altered := bytes.Clone(genuine)
	altered[len(altered)-1] ^= 1
	forged := []byte("k8s:enc:kms:v2:other:forged")
	legacy := aescbc(t, "key1", secret, objectAt("legacy"))
	flipped := bytes.Clone(legacy)
	flipped[len(flipped)-20] ^= 1
	values := []*pathValue{
		{name: "genuine", stored: genuine, yields: []byte("genuine")},
		{name: "plaintext", stored: []byte("forged"), yields: []byte("forged"), renewed: true, clear: true, past: true},
		{name: "empty", stored: []byte{}, yields: []byte{}, renewed: true, clear: true, past: true},
		{name: "foreign", stored: forged, yields: forged, handedOn: true, clear: true, past: true},
		{name: "moved", stored: genuine, clear: true},
		{name: "altered", stored: altered, clear: true},
		{name: "truncated", stored: genuine[:len(genuine)-1], clear: true},
		{name: "marker", stored: []byte("k8s:enc:kms:v2:dev:forged"), clear: true},
		{name: "legacy", stored: legacy, yields: objectAt("legacy"), renewed: true},
		{name: "legacy-moved", stored: legacy, clear: true},
		{name: "legacy-altered", stored: flipped, clear: true},
		{name: "legacy-mark", stored: aescbc(t, "key1", secret, []byte("k8s\x00forged")), clear: true},
		{name: "legacy-unknown-key", stored: []byte("k8s:enc:aescbc:v1:key2:forged"), clear: true},
	}
	if strict {
		for _, v := range values {
			if v.past { // refused by the rule's policy, and so by every path
				v.yields, v.handedOn, v.renewed = nil, false, false
			}
		}
	}
	revision := r.Header.Revision
	for _, v := range values[1:] {
		put(t, s.raw, v.key(), string(v.stored))
	}

	for _, v := range values {
		s.readPaths(t, v, revision)
	}
	s.bypassPath(t, values, strict)
	s.commandPaths(t, values, strict)
	for _, v := range values { // unchanged, whatever the commands did
		s.readPaths(t, v, 0)
	}
	for _, v := range values {
		r, err := s.kv.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(v.key()), PrevKv: true})
		var got []byte
		if err == nil {
			got = r.PrevKvs[0].Value
		}
		v.check(t, "delete with prev_kv", got, err)
	}
}

// check compares the result of a path.
func (v *pathValue) check(t *testing.T, path string, got []byte, err error) {
	t.Helper()
	refused := codes.DataLoss
	if v.name == "legacy-unknown-key" {
		refused = codes.FailedPrecondition // whose key can be added
	}
	switch {
	case v.yields != nil && (err != nil || !bytes.Equal(got, v.yields)):
		t.Errorf("%s: %s gives %q, %v, want %q", v.name, path, got, err, v.yields)
	case v.yields == nil && status.Code(err) != refused:
		t.Errorf("%s: %s gives %q, %v, want an error %s", v.name, path, got, err, refused)
	}
}

// readPaths reads a value in every way that clients can. revision is from before it was written; 0
// if it is not known.
func (s *site) readPaths(t *testing.T, v *pathValue, revision int64) {
	t.Helper()
	key, end := []byte(v.key()), []byte(prefix+v.name+"0")
	first := func(r *pb.RangeResponse, err error) ([]byte, error) {
		if err != nil {
			return nil, err
		}
		return r.Kvs[0].Value, nil
	}
	ctx := t.Context()
	for path, request := range map[string]*pb.RangeRequest{
		"a get":            {Key: key},
		"a list":           {Key: []byte(v.folder()), RangeEnd: end},
		"a list with more": {Key: []byte(v.folder()), RangeEnd: end, Limit: 1},
		"a serializable":   {Key: key, Serializable: true},
		"a sort by value":  {Key: []byte(v.folder()), RangeEnd: end, SortTarget: pb.RangeRequest_VALUE, SortOrder: pb.RangeRequest_DESCEND},
	} {
		got, err := first(s.kv.Range(ctx, request))
		v.check(t, path, got, err)
	}
	stream, err := s.kv.RangeStream(ctx, &pb.RangeRequest{Key: []byte(v.folder()), RangeEnd: end})
	if err != nil {
		t.Fatal(err)
	}
	chunk, err := stream.Recv()
	var streamed []byte
	if err == nil {
		streamed = chunk.RangeResponse.Kvs[0].Value
	}
	v.check(t, "a stream", streamed, err)

	get := []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: key}}}}
	for path, txn := range map[string]*pb.TxnRequest{
		"a transaction":        {Success: get},
		"a nested transaction": {Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: get}}}}},
	} {
		r, err := s.kv.Txn(ctx, txn)
		var got []byte
		if err == nil {
			if nested := r.Responses[0].GetResponseTxn(); nested != nil {
				r = nested
			}
			got = r.Responses[0].GetResponseRange().Kvs[0].Value
		}
		v.check(t, path, got, err)
	}
	// A compare reveals as much to a client as a read.
	compare := &pb.TxnRequest{Compare: []*pb.Compare{{Key: key, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: v.yields}}}}
	r, err := s.kv.Txn(ctx, compare)
	var same []byte
	if err == nil && r.Succeeded {
		same = v.yields
	}
	if v.yields == nil || r.GetSucceeded() || err != nil {
		v.check(t, "a compare", same, err)
	} else {
		t.Errorf("%s: a compare with what is read of it is false", v.name)
	}
	if revision > 0 && v.name != "genuine" {
		got, err := s.watched(t, v.key(), revision)
		v.check(t, "a watch", got, err)
	}
	got, err := s.gatewayed(t, v.key())
	v.check(t, "the gateway", got, err)
}

// watched returns the first event of a key after a revision.
func (s *site) watched(t *testing.T, key string, revision int64) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	w, err := pb.NewWatchClient(harness.Dial(t, s.proxy.Address, nil)).Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	request := &pb.WatchCreateRequest{Key: []byte(key), StartRevision: revision}
	if err := w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: request}}); err != nil {
		t.Fatal(err)
	}
	for {
		r, err := w.Recv()
		if err != nil {
			return nil, err
		}
		if len(r.Events) > 0 {
			return r.Events[0].Kv.Value, nil
		}
	}
}

// gatewayed reads a key through the JSON gateway.
func (s *site) gatewayed(t *testing.T, key string) ([]byte, error) {
	t.Helper()
	body := fmt.Sprintf(`{"key":%q}`, base64.StdEncoding.EncodeToString([]byte(key)))
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+s.proxy.Address+"/v3/kv/range", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	var answer struct {
		Code    codes.Code
		Message string
		Kvs     []struct{ Value []byte }
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		t.Fatalf("%v: %s", err, data)
	}
	if answer.Code != codes.OK {
		return nil, status.Error(answer.Code, answer.Message)
	}
	return answer.Kvs[0].Value, nil
}

// bypassPath checks what the bypass watch has counted, and what it recommends.
func (s *site) bypassPath(t *testing.T, values []*pathValue, strict bool) {
	t.Helper()
	past := 0
	for _, v := range values {
		if v.past {
			past++
		}
	}
	harness.Eventually(t, within, "the bypass watch to count", func() error {
		line := fmt.Sprintf("etcd_kms_proxy_plaintext_writes_seen_total{rule=%q} %d\n", prefix, past)
		if m := s.proxy.Scrape(); !strings.Contains(m, line) {
			return fmt.Errorf("no line %s", line)
		}
		return nil
	})
	if says := strings.Contains(s.proxy.Log(), "reencrypt skips it"); says != strict {
		t.Errorf("the hint says that reencrypt skips it: %v", says)
	}
}

// commandPaths runs the commands on the values.
func (s *site) commandPaths(t *testing.T, values []*pathValue, strict bool) {
	t.Helper()
	for _, v := range values {
		out, code := s.Run("decrypt", "--config", s.proxy.ConfigFile, "--yes", "--output", "json", v.key())
		var line struct {
			Value []byte
			Error string
		}
		if err := json.Unmarshal([]byte(out[strings.Index(out, "{"):strings.LastIndex(out, "}")+1]), &line); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if open := v.yields != nil && !v.handedOn; open != (code == 0) || open != (line.Error == "") || open && !bytes.Equal(line.Value, v.yields) || !open && line.Value != nil {
			t.Errorf("%s: decrypt: exit code %d: %s", v.name, code, out)
		}
	}
	found, _ := s.verify(t, 1, "")
	live := make(map[string]bool)
	for _, f := range found.List {
		if f.Place == "live" {
			live[f.Key] = true
		}
	}
	for _, v := range values {
		if live[v.key()] != v.clear {
			t.Errorf("%s: verify finds it: %v", v.name, live[v.key()])
		}
	}
	out := s.run(t, 1, "status")
	if says := strings.Contains(out, "reencrypt skips them"); says != strict {
		t.Errorf("status says that reencrypt leaves values: %v\n%s", says, out)
	}
	if out := s.run(t, 3, "purge --yes"); strings.Contains(out, "to see which, and reencrypt") == strict {
		t.Errorf("what purge recommends: %s", out)
	}

	var want []string
	for _, v := range values {
		if !v.renewed && v.name != "genuine" {
			want = append(want, v.key())
		}
	}
	slices.Sort(want)
	for _, flags := range []string{"--dry-run", ""} {
		out := s.run(t, 1, "reencrypt --output json "+flags)
		var report struct {
			Rewritten, Plaintext, Foreign int
			Left                          []struct{ Key string }
		}
		begin, end := strings.Index(out, "{\n"), strings.LastIndex(out, "\n}")
		if begin < 0 || end < begin {
			t.Fatalf("no report: %s", out)
		}
		if err := json.Unmarshal([]byte(out[begin:end+2]), &report); err != nil {
			t.Fatal(err)
		}
		var left []string
		for _, l := range report.Left {
			left = append(left, l.Key)
		}
		if !slices.Equal(left, want) || report.Foreign != 1 || strict != (report.Plaintext == 2) {
			t.Errorf("reencrypt %s leaves %v, want %v: %s", flags, left, want, out)
		}
	}
	for _, v := range values {
		r, err := s.raw.Range(t.Context(), &pb.RangeRequest{Key: []byte(v.key())})
		if err != nil {
			t.Fatal(err)
		}
		if same := bytes.Equal(r.Kvs[0].Value, v.stored); same == v.renewed {
			t.Errorf("%s: reencrypt left it: %v", v.name, same)
		}
	}
}
