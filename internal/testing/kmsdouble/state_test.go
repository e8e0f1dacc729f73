package kmsdouble

import (
	"sync/atomic"
	"testing"
	"time"
)

// TestPermissions are a caller's, and are looked at before the key.
func TestPermissions(t *testing.T) {
	d := New(t, Config{})
	c := newCaller(t, d)
	key := map[string]string{"KeyId": DefaultKeyID}
	blob, _ := c.expect("generate", c.params("GenerateDataKey", key, nil, nil), 200, "")["CiphertextBlob"].(string)
	d.Permit(DefaultAccessKeyID, "DescribeKey")
	c.expect("describe", c.params("DescribeKey", key, nil, nil), 200, "")
	for action, p := range map[string]map[string]string{
		"GenerateDataKey": key, "Encrypt": {"KeyId": "key-none"}, "Decrypt": {"CiphertextBlob": blob}, "ListKeyVersions": key,
	} {
		before := d.Applied(action)
		c.expect(action, c.params(action, p, nil, nil), 403, "Forbidden.NoPermission")
		if n := d.Applied(action) - before; n != 0 {
			t.Errorf("%s was carried out", action)
		}
	}
	d.Permit(DefaultAccessKeyID)
	c.expect("nothing is permitted", c.params("DescribeKey", key, nil, nil), 403, "Forbidden.NoPermission")
	d.PermitAll(DefaultAccessKeyID)
	c.expect("decrypt", c.params("Decrypt", map[string]string{"CiphertextBlob": blob}, nil, nil), 200, "")
}

// TestMaterialExpires as the double's clock goes, and comes back by an import.
func TestMaterialExpires(t *testing.T) {
	var now atomic.Int64
	now.Store(time.Now().Unix())
	clock := func() time.Time { return time.Unix(now.Load(), 0) }
	d := New(t, Config{Now: clock, Keys: []KeyConfig{{ID: DefaultKeyID, MaterialExpires: clock().Add(time.Minute)}}})
	c := newCaller(t, d)
	key := map[string]string{"KeyId": DefaultKeyID}
	blob, _ := c.expect("before", c.params("GenerateDataKey", key, nil, nil), 200, "")["CiphertextBlob"].(string)
	state := func() any {
		fields := c.expect("describe", c.params("DescribeKey", key, nil, nil), 200, "")
		return fields["KeyMetadata"].(map[string]any)["KeyState"]
	}
	if s := state(); s != "Enabled" {
		t.Errorf("%v before", s)
	}
	now.Add(60)
	c.expect("generate", c.params("GenerateDataKey", key, nil, nil), 409, "Rejected.PendingImport")
	c.expect("decrypt", c.params("Decrypt", map[string]string{"CiphertextBlob": blob}, nil, nil), 409, "Rejected.PendingImport")
	if s := state(); s != "PendingImport" {
		t.Errorf("%v after", s)
	}
	d.ImportMaterial(DefaultKeyID, clock().Add(time.Hour))
	c.expect("decrypt", c.params("Decrypt", map[string]string{"CiphertextBlob": blob}, nil, nil), 200, "")
}
