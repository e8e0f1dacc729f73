package proxytest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// Authority signs certificates for tests and writes them to files.
type Authority struct {
	t    *testing.T
	Dir  string
	Cert *x509.Certificate
	key  *ecdsa.PrivateKey
	File string
}

func NewAuthority(t *testing.T, name string) *Authority {
	t.Helper()
	a := &Authority{t: t, Dir: t.TempDir()}
	tmpl := &x509.Certificate{
		SerialNumber: serial(t), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	a.key = newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.Cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.File = filepath.Join(a.Dir, "ca.pem")
	WritePEM(t, a.File, "CERTIFICATE", der)
	return a
}

func serial(t *testing.T) *big.Int {
	n, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func WritePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	Replace(t, path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// Replace puts a file in the place of another one, as a careful operator does: it is complete, and
// was a moment before, so it counts at once.
func Replace(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	before := time.Now().Add(-time.Second)
	if err := os.Chtimes(path+".new", before, before); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// Issue writes NAME.pem and NAME-key.pem for a leaf that serves on loopback and is a client too.
func (a *Authority) Issue(name, cn string, names ...string) (cert, key string, leaf *x509.Certificate) {
	a.t.Helper()
	return a.IssueFor(time.Hour, name, cn, names...)
}

// IssueFor issues a certificate that is valid for so long, in whole seconds.
func (a *Authority) IssueFor(valid time.Duration, name, cn string, names ...string) (cert, key string, leaf *x509.Certificate) {
	a.t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: serial(a.t), Subject: pkix.Name{CommonName: cn}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(valid),
		DNSNames: names, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	k := newKey(a.t)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.Cert, k.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	if leaf, err = x509.ParseCertificate(der); err != nil {
		a.t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, key = filepath.Join(a.Dir, name+".pem"), filepath.Join(a.Dir, name+"-key.pem")
	WritePEM(a.t, key, "PRIVATE KEY", kder)
	WritePEM(a.t, cert, "CERTIFICATE", der)
	return cert, key, leaf
}

func (a *Authority) Revoke(path string, leaves ...*x509.Certificate) {
	a.t.Helper()
	list := &x509.RevocationList{Number: serial(a.t), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}
	for _, l := range leaves {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: l.SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.Cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	WritePEM(a.t, path, "X509 CRL", der)
}

// Client dials the proxy as cn, trusting a.
func (a *Authority) Client(t *testing.T, target, cn string, names ...string) *grpc.ClientConn {
	t.Helper()
	return Dial(t, target, grpc.WithTransportCredentials(credentials.NewTLS(a.ClientConfig(t, cn, names...))))
}

// ClientConfig is that of a client with a certificate, or without one if it has no name.
func (a *Authority) ClientConfig(t *testing.T, cn string, names ...string) *tls.Config {
	t.Helper()
	cfg := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "127.0.0.1"}
	cfg.RootCAs.AddCert(a.Cert)
	if cn != "" || len(names) > 0 {
		cert, key, _ := a.Issue("client-"+cn, cn, names...)
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg
}

func EchoEtcd() *FakeEtcd {
	return &FakeEtcd{
		RangeFn: func(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
			return &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{{Key: r.Key, Value: Sealed(string(r.Key), "v")}}}, nil
		},
		PutFn: func(context.Context, *pb.PutRequest) (*pb.PutResponse, error) { return &pb.PutResponse{}, nil },
		DeleteFn: func(context.Context, *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
			return &pb.DeleteRangeResponse{}, nil
		},
		TxnFn: func(context.Context, *pb.TxnRequest) (*pb.TxnResponse, error) { return &pb.TxnResponse{}, nil },
		WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
			if _, err := s.Recv(); err != nil {
				return err
			}
			return s.Send(&pb.WatchResponse{Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: Sealed("k", "v")}}}})
		},
	}
}

func Get(t *testing.T, conn *grpc.ClientConn) (string, error) {
	t.Helper()
	r, err := pb.NewKVClient(conn).Range(TestContext(t), &pb.RangeRequest{Key: []byte("k")})
	if err != nil {
		return "", err
	}
	return string(r.Kvs[0].Value), nil
}
