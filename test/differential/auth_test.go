package differential

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

func (b *bench) metadata(t *testing.T) {
	// The stores differ since the injections, so the test compares only responses without a
	// revision.
	for _, pairs := range [][]string{{"hasleader", "true"}, {"client-api-version", "3.7"}, {"token", "wrong"}, {"authorization", "wrong"}} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), pairs...)
		_, bareErr := b.bare.auth.AuthStatus(ctx, &pb.AuthStatusRequest{})
		_, viaErr := b.via.auth.AuthStatus(ctx, &pb.AuthStatusRequest{})
		if status.Code(bareErr) != status.Code(viaErr) || status.Convert(bareErr).Message() != status.Convert(viaErr).Message() {
			t.Errorf("metadata %v: bare etcd %v, the proxy %v", pairs, bareErr, viaErr)
		}
	}
	bare, bareErr := b.bare.maint.Status(t.Context(), &pb.StatusRequest{})
	via, viaErr := b.via.maint.Status(t.Context(), &pb.StatusRequest{})
	if bareErr != nil || viaErr != nil || bare.Version != via.Version || bare.StorageVersion != via.StorageVersion || bare.Leader != via.Leader {
		t.Errorf("status: bare etcd %v %v, the proxy %v %v", bare, bareErr, via, viaErr)
	}
}

// TestJWT uses signed tokens, with every version of etcd.
func TestJWT(t *testing.T) {
	t.Parallel()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, block := range map[string]*pem.Block{
		"private": {Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}, "public": {Type: "PUBLIC KEY", Bytes: public},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, version := range harness.Versions(t) {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, version, ruleSets[1], "--auth-token", fmt.Sprintf("jwt,pub-key=%[1]s/public,priv-key=%[1]s/private,sign-method=RS256,ttl=10m", dir))
			b.users(t)
		})
	}
}

// users runs one authentication script on both sides and compares codes and texts.
func (b *bench) users(t *testing.T) {
	type outcome struct {
		step string
		code codes.Code
		text string
	}
	script := func(s *side) []outcome {
		var all []outcome
		ctx := t.Context()
		add := func(step string, err error) {
			all = append(all, outcome{step, status.Code(err), status.Convert(err).Message()})
		}
		as := func(name, password string) context.Context {
			answer, err := s.auth.Authenticate(ctx, &pb.AuthenticateRequest{Name: name, Password: password})
			add("authenticate "+name, err)
			return metadata.AppendToOutgoingContext(ctx, "token", answer.GetToken())
		}
		_, err := s.auth.AuthEnable(ctx, &pb.AuthEnableRequest{})
		add("enable without root", err)
		for _, user := range []string{"root", "reader", "root"} {
			_, err = s.auth.UserAdd(ctx, &pb.AuthUserAddRequest{Name: user, Password: b.env.Clear.Value("password")})
			add("add user "+user, err)
		}
		for _, role := range []string{"root", "secrets"} {
			_, err = s.auth.RoleAdd(ctx, &pb.AuthRoleAddRequest{Name: role})
			add("add role "+role, err)
		}
		_, err = s.auth.RoleGrantPermission(ctx, &pb.AuthRoleGrantPermissionRequest{Name: "secrets", Perm: newReadPermission("/s/", "/s0")})
		add("grant permission", err)
		for user, role := range map[string]string{"root": "root", "reader": "secrets"} {
			_, err = s.auth.UserGrantRole(ctx, &pb.AuthUserGrantRoleRequest{User: user, Role: role})
			add("grant role", err)
		}
		_, err = s.auth.AuthEnable(ctx, &pb.AuthEnableRequest{})
		add("enable", err)
		root, reader := as("root", b.env.Clear.Value("password")), as("reader", b.env.Clear.Value("password"))
		as("reader", "wrong")
		for name, ctx := range map[string]context.Context{
			"root": root, "reader": reader, "nobody": ctx, "a wrong token": metadata.AppendToOutgoingContext(ctx, "token", "wrong"),
		} {
			_ = name
			for _, key := range []string{"/s/a", "/u/1"} {
				_, err = s.kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(b.env.Sealed.Value("by " + name)[:0])})
				add(name+" puts "+key, err)
				_, err = s.kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
				add(name+" gets "+key, err)
				_, err = s.kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte("\x00")})
				add(name+" deletes from "+key, err)
			}
			lease := &pb.LeaseGrantRequest{ID: map[string]int64{"root": 101, "reader": 102, "nobody": 103, "a wrong token": 104}[name], TTL: 600}
			_, err = s.lease.LeaseGrant(root, lease)
			add("root grants a lease for "+name, err)
			_, err = s.kv.Put(root, &pb.PutRequest{Key: []byte("/s/leased " + name), Lease: lease.ID})
			add("root uses the lease for "+name, err)
			_, err = s.lease.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: lease.ID})
			add(name+" revokes it", err)
			_, err = s.lease.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: 99})
			add(name+" revokes one that there is not", err)
			_, err = s.kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte("/"), RangeEnd: []byte("0")})
			add(name+" deletes everything", err)
			_, err = s.lease.LeaseLeases(ctx, &pb.LeaseLeasesRequest{})
			add(name+" lists leases", err)
			_, err = s.maint.Defragment(ctx, &pb.DefragmentRequest{})
			add(name+" defragments", err)
			w, err := s.openWatch(ctx)
			if err == nil {
				err = w.create(&pb.WatchCreateRequest{Key: []byte("/u/1")})
				if err == nil {
					err = errors.New(w.seen.created[0].CancelReason)
				}
				w.close()
			}
			add(name+" watches", err)
		}
		_, err = s.auth.AuthDisable(root, &pb.AuthDisableRequest{})
		add("disable", err)
		return all
	}
	byStep := func(all []outcome) map[string]string {
		m := map[string]string{}
		for _, o := range all {
			m[o.step] += fmt.Sprintf("%v %q; ", o.code, o.text)
		}
		return m
	}
	bare, via := byStep(script(b.bare)), byStep(script(b.via))
	for step, want := range bare {
		if via[step] != want {
			t.Errorf("%s: bare etcd %s, the proxy %s", step, want, via[step])
		}
	}
}
