package encryption

import (
	"context"
	"errors"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

func TestSealErrors(t *testing.T) {
	if err := sealError(context.Background(), nil); err != nil {
		t.Errorf("no error became %v", err)
	}
	for kind, want := range map[keyring.Kind]codes.Code{
		keyring.Unavailable: codes.Unavailable, keyring.KeyUnusable: codes.FailedPrecondition, keyring.Refused: codes.FailedPrecondition,
		keyring.Corrupt: codes.DataLoss, keyring.Plaintext: codes.DataLoss,
	} {
		err := sealError(context.Background(), &keyring.Error{Kind: kind, Text: "text", Err: context.Canceled})
		if e, ok := errors.AsType[*proxy.SealError](err); !ok || e.Code != want || e.Text != "text" {
			t.Errorf("%v became %#v, want code %v", kind, err, want)
		}
	}
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	if err := sealError(gone, &keyring.Error{Kind: keyring.Unavailable}); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who went away gets %v", err)
	}
	if err := sealError(gone, &keyring.Error{Kind: keyring.Corrupt}); errors.Is(err, context.Canceled) {
		t.Error("a corrupt value is corrupt for every caller")
	}
	unknown := errors.New("unknown")
	if err := sealError(context.Background(), unknown); !errors.Is(err, unknown) {
		t.Errorf("an unknown error became %v", err)
	}
}
