package local_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
)

// After a rotation, the new key wraps, and the old one still unwraps.
func Example() {
	dir, _ := os.MkdirTemp("", "local")
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "key.yaml")
	_ = local.NewKeyFile(path)
	kms, err := local.New(local.Config{KeyFile: path})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx := context.Background()
	wrapped, _ := kms.Encrypt(ctx, "uid-1", []byte("DEK seed"))
	fmt.Println("wrapped by key", wrapped.KeyID)

	_ = local.AddVersion(path)
	status, _ := kms.Status(ctx)
	fmt.Println("key in use", status.KeyID)

	seed, err := kms.Decrypt(ctx, "uid-2", &service.DecryptRequest{Ciphertext: wrapped.Ciphertext, KeyID: wrapped.KeyID})
	fmt.Printf("%s %v\n", seed, err)
	// Output:
	// wrapped by key 1
	// key in use 2
	// DEK seed <nil>
}
