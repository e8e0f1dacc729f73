package kmstest

import (
	"context"
	"testing"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestPersonalities: each plays its plugin: the suite passes exactly those that can be used.
func TestPersonalities(t *testing.T) {
	names := map[string]bool{}
	for _, p := range Personalities() {
		if names[p.Name] {
			t.Errorf("%s is there twice", p.Name)
		}
		names[p.Name] = true
		t.Run(p.Name, func(t *testing.T) {
			if p.Unusable == "" {
				Conformance(t, func(*testing.T) kmsclient.Service { return calm{NewPersona(p)} }, p.Opts()...)
				return
			}
			failed := 0
			for _, c := range checks {
				if runCheck(context.Background(), c, calm{NewPersona(p)}, p.Opts()...) != nil {
					failed++
				}
			}
			if failed == 0 {
				t.Errorf("the suite does not notice: %s", p.Unusable)
			}
		})
	}
}

// calm answers a panic with an error, as the server of the plugin does here.
type calm struct{ *Persona }

func (c calm) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) (data []byte, err error) {
	defer func() {
		if recover() != nil {
			data, err = nil, errUnknown(opDecrypt, req.KeyID)
		}
	}()
	return c.Persona.Decrypt(ctx, uid, req)
}
